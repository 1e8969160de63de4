"""Train Medusa heads for the demo model: four small heads that guess the tokens after the next one.

    python scripts/train_medusa.py                      a few minutes on two CPU cores
    python scripts/train_medusa.py --quick --out DIR    a few seconds, to see that everything works

The model itself stays as it is: its hidden states are computed without a gradient, once a batch, and the heads learn to
read later tokens from them, from the same kind of text as it (``demo_text.py``). As published (Cai et al. 2024, arXiv
2401.10774): the residual blocks begin as the identity and the vocabulary layers as copies of the model's own, so every
head begins as the model's head; a head's loss weighs 0.8 times that of the head before it.

A head guesses within its document only: after the end of one nothing is generated, and the next one cannot be known.
All numbers in the README are measured on the saved bfloat16 weights.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_text import LONGER_SHARES, Document, TextMaker
from train_demo_model import (
    CONTEXT,
    HELD_OUT,
    IGNORED,
    SHAPE,
    SIZE_LIMIT,
    Plan,
    Stage,
    Tokens,
    batches,
    human,
    learning_rate,
    load,
    log,
)

from llama.checkpoint import writing
from llama.checkpoint.medusa import load_medusa, open_medusa
from llama.compiled.medusa import MedusaHeads
from llama.compiled.model import Transformer

HEADS = 4
LAYERS = 1
DECAY = 0.8  # of a head's loss beside the one before it
HEADS_LIMIT = 3_000_000  # bytes of the directory
WEIGHTS = "medusa_lm_head.safetensors"

FULL = Plan(
    SHAPE,
    steps=1000,
    stages=(Stage(0.8, 8, CONTEXT // 2), Stage(0.2, 4, CONTEXT)),
    peak_lr=1e-2,
    warmup=40,
    held_out=100,
    shares=LONGER_SHARES,
)
QUICK = replace(FULL, steps=3, stages=(Stage(1.0, 1, 128),), warmup=1, held_out=2)


def new_heads(model: Transformer) -> MedusaHeads:
    """Trainable heads that all predict what the model's own head does."""
    args = model.args
    heads = MedusaHeads(HEADS, LAYERS, args.dim, args.vocab_size)
    own = model.tok_embeddings if args.tie_word_embeddings else model.output
    for name, parameter in heads.named_parameters():
        parameter.data = torch.zeros_like(parameter) if ".linear." in name else own.weight.detach().clone()
        parameter.requires_grad_(True)
    return heads


@torch.no_grad()
def hidden_states(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """What the heads read: the model's output after its final norm, [B, T, dim]."""
    return model.norm(model(ids, torch.arange(ids.shape[1]).expand_as(ids)))


def head_losses(heads: MedusaHeads, hidden: torch.Tensor, whole: torch.Tensor, bos: int) -> torch.Tensor:
    """Mean cross-entropy of each head, [H].

    Args:
        hidden: [B, T, dim] of the first T tokens.
        whole: [B, T + 1], packed documents, each from its BOS on.
        bos: the token's id.
    """
    documents = (whole == bos).cumsum(1)
    losses = []
    for i, logits in enumerate(heads(hidden)):
        ahead = i + 2
        within = documents[:, ahead:] == documents[:, :-ahead]
        targets = whole[:, ahead:].masked_fill(~within, IGNORED)
        guesses = logits[:, : targets.shape[1]]
        losses.append(F.cross_entropy(guesses.flatten(0, 1), targets.flatten(), ignore_index=IGNORED))
    return torch.stack(losses)


def train(plan: Plan, model: Transformer, heads: MedusaHeads, tokens: Tokens, seed: int) -> None:
    """Run all steps, in float32: without the processor's own bfloat16 arithmetic, autocast took eight times as long."""
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    weights = DECAY ** torch.arange(len(heads))
    started = time.monotonic()
    recent = torch.zeros(len(heads))
    for step, (ids, targets) in enumerate(batches(plan, tokens, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan)
        whole = torch.cat((ids, targets[:, -1:]), dim=1)
        losses = head_losses(heads, hidden_states(model, ids), whole, tokens.bos)
        (losses * weights).sum().backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent = losses.detach() if step == 0 else 0.95 * recent + 0.05 * losses.detach()
        if step % 50 == 0 or step == plan.steps - 1:
            shown = "  ".join(f"{loss:.3f}" for loss in recent.tolist())
            log(f"step {step:5d} of {plan.steps}  losses {shown}  {(time.monotonic() - started) / 60:5.1f} min")


# ---- saving and measuring


def save(out: Path, heads: MedusaHeads, base: str) -> None:
    """Write the heads under the published names, in bfloat16, and their config.json."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().to(torch.bfloat16) for name, tensor in heads.state_dict().items()}
    table = writing.safetensors_table({name: (tuple(t.shape), t.dtype) for name, t in weights.items()})
    (out / WEIGHTS).unlink(missing_ok=True)
    writing.write_safetensors(out / WEIGHTS, table, {"format": "pt"}, (weights[name] for name in table))
    config = {"medusa_num_heads": HEADS, "medusa_num_layers": LAYERS, "base_model_name_or_path": base}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@dataclass(frozen=True)
class Score:
    """How often guesses come true where a document of one kind is generated.

    Attributes:
        own: the share of next tokens that the model's own head ranks first.
        heads: the same for each head and its token.
        accepted: how many heads in a row guess right, on average, from the first on.
    """

    own: float
    heads: list[float]
    accepted: float


def generated_part(tokens: Tokens, document: Document) -> tuple[list[int], int]:
    """A document's ids, and at which of them its answer begins; a story is all answer."""
    text = document.prompt + document.answer or document.text
    ids = tokens.whole(text) if text == document.text else tokens.prompt(text)
    return ids[:CONTEXT], len(tokens.prompt(document.prompt))


@torch.no_grad()
def score(model: Transformer, heads: MedusaHeads, tokens: Tokens, documents: Sequence[Document]) -> Score:
    """Measure the guesses at every position from a prompt's last token on, up to where all tokens are known."""
    own: list[torch.Tensor] = []
    hits: list[torch.Tensor] = []  # [positions, H] of each document
    for document in documents:
        ids, start = generated_part(tokens, document)
        count = len(ids) - start - len(heads)  # positions whose last guess is still a token of the document
        if count < 1:
            continue
        hidden = hidden_states(model, torch.tensor([ids]))[0, start - 1 : start - 1 + count]
        whole = torch.tensor(ids)
        own.append(model.output(hidden).argmax(-1) == whole[start : start + count])
        ahead = [logits.argmax(-1) == whole[start + i + 1 :][:count] for i, logits in enumerate(heads(hidden))]
        hits.append(torch.stack(ahead, dim=1))
    if not hits:
        return Score(math.nan, [math.nan] * len(heads), math.nan)
    every = torch.cat(hits).float()
    return Score(
        own=torch.cat(own).float().mean().item(),
        heads=every.mean(0).tolist(),
        accepted=every.cumprod(1).sum(1).mean().item(),
    )


def measure(plan: Plan, out: Path, model: Transformer, tokens: Tokens, seed: int) -> dict[str, Score]:
    """Score the heads in ``out`` on held-out documents of each kind."""
    heads = load_medusa(open_medusa(out), model.args, torch.float32, torch.device("cpu"))
    maker = TextMaker(seed + HELD_OUT, plan.shares)
    scores = {}
    for kind in plan.shares:
        scores[kind] = score(model, heads, tokens, [maker.of_kind(kind) for _ in range(plan.held_out)])
    return scores


# ---- README

README = """# Medusa heads of the demo model

{heads} heads that guess the tokens after the next one (Cai et al. 2024, arXiv 2401.10774), for the demo model in
`{base}` alone. Each is {layers} residual block and a vocabulary layer.

- `{weights}`: {size}, under the published names `i.j.linear.weight`, `i.j.linear.bias`, `i.{layers}.weight`
- `config.json`: their numbers, and the model

## How they were made

    {command}

{steps} steps, {tokens:.1f} million tokens of generated text, {minutes:.0f} minutes on {cores} CPU cores. The model's
own weights stay as they are.

## How often they are right

The share of tokens that a head ranks first, measured on the weights as saved in bfloat16 with {held_out} held-out
documents of each kind, within the answer (a story: all of it). "Next" is the model's own head, head i guesses i + 1
tokens further. "In a row" is how many heads guess right, on average, from head 0 on: so many tokens more than one a
step of the model can yield.

| kind | next | {columns} | in a row |
| --- | --- | {rules} | --- |
{table}
"""


def write_readme(out: Path, plan: Plan, scores: dict[str, Score], options: argparse.Namespace, minutes: float) -> None:
    """Write the README with how the heads were made and the measurements."""
    rows = [
        f"| {kind} | {s.own:.1%} | {' | '.join(f'{each:.1%}' for each in s.heads)} | {s.accepted:.2f} |"
        for kind, s in scores.items()
    ]
    text = README.format(
        heads=HEADS,
        layers=LAYERS,
        base=options.ckpt_dir,
        weights=WEIGHTS,
        size=human((out / WEIGHTS).stat().st_size),
        command="python scripts/train_medusa.py"
        + " --quick" * options.quick
        + f" --seed {options.seed} --steps {plan.steps}",
        steps=plan.steps,
        tokens=sum(stage.share * plan.steps * stage.rows * stage.length for stage in plan.stages) / 1e6,
        minutes=minutes,
        cores=torch.get_num_threads(),
        held_out=plan.held_out,
        columns=" | ".join(f"head {i}" for i in range(HEADS)),
        rules=" | ".join(["---"] * HEADS),
        table="\n".join(rows),
    )
    (out / "README.md").write_text(text)


def check_size(directory: Path, limit: int) -> None:
    """Refuse what the repository does not take."""
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    if size > limit:
        raise SystemExit(f"{directory} has {size} bytes, more than the {limit} that the repository takes")


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train Medusa heads for the demo model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ckpt_dir", type=Path, default=Path("llama/demo"), help="directory of the demo model")
    parser.add_argument("--out", type=Path, default=Path("llama/demo/medusa"), help="directory to write into")
    parser.add_argument("--seed", type=int, default=0, help="of the text")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the plan's own")
    parser.add_argument("--quick", action="store_true", help="a few short steps, to test the script")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, save, measure, and write the README."""
    options = parse_options(argv)
    plan = QUICK if options.quick else FULL
    if options.steps is not None:
        plan = replace(plan, steps=options.steps)
    started = time.monotonic()
    model = load(options.ckpt_dir).requires_grad_(False)
    tokens = Tokens((options.ckpt_dir / "tokenizer.model").read_bytes())
    heads = new_heads(model)
    log(f"{sum(p.numel() for p in heads.parameters())} parameters in {len(heads)} heads")
    train(plan, model, heads, tokens, options.seed)
    minutes = (time.monotonic() - started) / 60
    save(options.out, heads, str(options.ckpt_dir))
    scores = measure(plan, options.out, model, tokens, options.seed)
    write_readme(options.out, plan, scores, options, minutes)
    for kind, found in scores.items():
        shares = "  ".join(f"{each:.1%}" for each in found.heads)
        print(f"{kind:9} next {found.own:.1%}  heads {shares}  in a row {found.accepted:.2f}")
    check_size(options.out, HEADS_LIMIT)
    if options.ckpt_dir.resolve() in options.out.resolve().parents:
        check_size(options.ckpt_dir, SIZE_LIMIT)


if __name__ == "__main__":
    main()
