"""Train the demo model in ``llama/demo``: text, tokenizer, weights and README from one seed.

    python scripts/train_demo_model.py                      about half an hour on two CPU cores
    python scripts/train_demo_model.py --go_on longer       then this, about 15 minutes more
    python scripts/train_demo_model.py --go_on copies       and this
    python scripts/train_demo_model.py --quick --out DIR    a few seconds, to see that everything works

The model is a toy: large enough to tell a small story, answer a question about a passage and copy a text, small enough
for the repository. It is the project's own ``Transformer`` on plain CPU tensors, trained on text that ``demo_text.py``
makes as training goes, so that no document is seen twice.

Training starts with a drill: short runs of random tokens, each to be copied. Within a few hundred steps that forms the
attention heads that look up what followed last time; from text alone they had not formed after 2500, and the model
mixed up its heroes' names. The drill fades out while text comes in: ended at once, it was forgotten. Rows are short at
first, because attention dominates the cost on a CPU, and of the full context at the end. All numbers in the README are
measured on the saved bfloat16 weights.

``--go_on`` trains the model in ``--out`` further, with its own tokenizer: ``longer`` on rows of which many hold a
passage of several sentences twice, word for word or with edits, ``copies`` on more of them, and there on the second
passage alone.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sentencepiece as spm
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_text import KIND_SHARES, LONGER_SHARES, Document, TextMaker, count_shapes

from llama.compiled.model import Transformer
from llama.config import ModelArgs

CONTEXT = 512
SIZE_LIMIT = 8_000_000  # bytes of all files together
HELD_OUT = 1_000_003  # added to the seed for text that training never sees
COMPILED_LENGTH = 256  # stages of shorter rows are over before compiling them would pay
IGNORED = -100  # the target of positions without one, as F.cross_entropy has it


@dataclass(frozen=True)
class Stage:
    """A stage of training.

    Attributes:
        share: of all steps.
        rows: of a step's batch.
        length: tokens of a row.
        drill_rows: so many of the rows are the copying drill, the others are text.
        drill_run: most random tokens that the drill repeats, where text stands beside it.
        answers_only: the first passage of a long one that comes twice has no targets.
    """

    share: float
    rows: int
    length: int
    drill_rows: int = 0
    drill_run: int = 24
    answers_only: bool = False


@dataclass(frozen=True)
class Plan:
    """All numbers of a run.

    Attributes:
        params: what goes into params.json, in Meta's names.
        steps: optimizer steps.
        stages: in order; their shares sum to 1.
        peak_lr: learning rate after the warm-up; a cosine takes it down to a twentieth.
        warmup: steps of the warm-up.
        tokenizer_documents: how many documents the tokenizer learns from.
        held_out: documents of each kind that are measured at the end.
        shape_documents: documents whose sentence shapes are counted.
        sample_length: most tokens of a sample in the README.
        shares: how often each kind of document comes.
    """

    params: dict[str, Any]
    steps: int
    stages: tuple[Stage, ...]
    peak_lr: float = 1.2e-3
    warmup: int = 100
    tokenizer_documents: int = 6000
    held_out: int = 300
    shape_documents: int = 20_000
    sample_length: int = 250
    shares: Mapping[str, float] = field(default_factory=lambda: KIND_SHARES)


SHAPE = {
    "dim": 192,
    "n_layers": 6,
    "n_heads": 6,
    "n_kv_heads": 2,
    "vocab_size": 1024,
    "multiple_of": 64,
    "norm_eps": 1e-5,
}
FULL = Plan(
    SHAPE,
    steps=7500,
    stages=(
        Stage(0.08, 32, 64, drill_rows=32),
        Stage(0.10, 8, 256, drill_rows=4),
        Stage(0.20, 8, 256, drill_rows=2),
        Stage(0.48, 8, 256, drill_rows=1),
        Stage(0.14, 4, CONTEXT),
    ),
)
LONGER = Plan(
    SHAPE,
    steps=1500,
    stages=(Stage(0.7, 4, 384, drill_rows=1, drill_run=100), Stage(0.3, 4, CONTEXT)),
    peak_lr=8e-4,
    shares=LONGER_SHARES,
)
COPIES = replace(
    LONGER,
    steps=1600,
    stages=(Stage(0.5, 4, 384, drill_rows=1, drill_run=100, answers_only=True), Stage(0.5, 4, 384, answers_only=True)),
    shares={"story": 0.16, "question": 0.08, "repeat": 0.2, "complete": 0.04, "recite": 0.3, "rewrite": 0.22},
)
GO_ON = {"longer": LONGER, "copies": COPIES}
TWICE = ("recite", "rewrite")  # kinds of documents that hold a long passage twice
QUICK = Plan(
    SHAPE | {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 512},
    steps=6,
    stages=(Stage(0.3, 2, 64, drill_rows=2), Stage(0.4, 2, 64, drill_rows=1), Stage(0.3, 1, CONTEXT)),
    warmup=2,
    tokenizer_documents=300,
    held_out=4,
    shape_documents=200,
    sample_length=12,
)
PASSAGE = (
    "On Monday, Clara and her uncle were by the lake when Clara found a silver key. Boris hid a green drum in the barn."
)
SAMPLES = (
    ("Once upon a time", 0.0),
    ("Once upon a time", 0.8),
    ("In a little house near the river, there lived", 0.8),
    (f"{PASSAGE}\nQuestion: Where did Boris hide the green drum? Answer:", 0.0),
    ("Repeat: seven brave otters and Zamiro carried the old lamp to Tilda.\nCopy:", 0.0),
    ("Change Tom to Mia: Tom found a golden bell by the river. Tom rang the bell and smiled.\nChanged:", 0.0),
)


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# ---- tokenizer


def train_tokenizer(seed: int, documents: int, vocab_size: int) -> bytes:
    """Train a SentencePiece BPE model with LLaMA's settings.

    Characters without a piece become bytes, digits are split, and nothing is normalized.
    """
    maker = TextMaker(seed)
    # a line's first word follows a newline, not a space; the quotation mark puts it there, since SentencePiece reads
    # single lines
    lines = ('"' * (i > 0) + line for _ in range(documents) for i, line in enumerate(maker.document().text.split("\n")))
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        pad_id=-1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    return model.getvalue()


class Tokens:
    """Documents as token ids."""

    def __init__(self, model: bytes) -> None:
        self.processor = spm.SentencePieceProcessor(model_proto=model)
        self.bos, self.eos = self.processor.bos_id(), self.processor.eos_id()
        self.newline = self.processor.piece_to_id("<0x0A>")
        self.first_piece = self.processor.piece_to_id("<0xFF>") + 1  # control tokens and bytes come before the pieces

    def prompt(self, text: str) -> list[int]:
        """BOS and the text."""
        return [self.bos, *self.processor.encode(text)]

    def whole(self, text: str) -> list[int]:
        """BOS, the text and EOS."""
        return [*self.prompt(text), self.eos]


Row = tuple[list[int], list[int]]  # token ids and targets


def text_rows(tokens: Tokens, maker: TextMaker, stage: Stage) -> Iterator[Row]:
    """Packed documents without end.

    Every row starts with a document's BOS, as a prompt does in use. The document that a row cuts off opens the next
    row, so that each is seen to its end unless it is longer than a row.
    """
    cut: Row = ([], [])
    while True:
        row, cut = cut, ([], [])
        while len(row[0]) <= stage.length:
            document = maker.document()
            ids = tokens.whole(document.text)
            unasked = len(tokens.prompt(document.prompt)) if stage.answers_only and document.kind in TWICE else 0
            wanted = [IGNORED] * unasked + ids[unasked:]
            if row[0] and len(row[0]) + len(ids) > stage.length + 1:
                cut = (ids, wanted)
            row = (row[0] + ids, row[1] + wanted)
        yield row[0][: stage.length], row[1][1 : stage.length + 1]


def drill_rows(tokens: Tokens, rng: random.Random, stage: Stage) -> Iterator[Row]:
    """Yield random tokens, a newline, and the same tokens again.

    Only the repetition has targets, because the first run cannot be predicted.

    Beside text the runs are longer and often of few different tokens, as text's are: then one token before does not yet
    identify the place to copy.
    """
    pieces = range(tokens.first_piece, len(tokens.processor))
    beside_text = stage.drill_rows < stage.rows
    while True:
        row: list[int] = []
        wanted: list[int] = []
        while len(row) <= stage.length:
            size = rng.choice((len(pieces), len(pieces), 200, 40, 10)) if beside_text else len(pieces)
            alphabet = rng.sample(pieces, min(size, len(pieces)))
            run = rng.choices(alphabet, k=rng.randint(2, stage.drill_run if beside_text else 10))
            row += [tokens.bos, *run, tokens.newline, *run]
            wanted += [IGNORED] * (len(run) + 2) + run
        yield row[: stage.length], wanted[1 : stage.length + 1]


# ---- training


def new_model(args: ModelArgs, seed: int) -> Transformer:
    """A trainable model.

    The layers' matrices start near ``dim ** -0.5``, which attention needs to leave uniformity soon; those that write to
    the residual stream start smaller, since their outputs add up.
    """
    model = Transformer(args, CONTEXT)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        if parameter.dim() == 2:
            std = 0.06 if name.startswith("layers.") else 0.02
            if name.endswith(("wo.weight", "w2.weight")):
                std /= math.sqrt(2 * args.n_layers)
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model


def new_optimizer(model: Transformer) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms alone."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def learning_rate(step: int, plan: Plan) -> float:
    """Linear warm-up, then half a cosine down to a twentieth of the peak."""
    if step < plan.warmup:
        return plan.peak_lr * (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.peak_lr * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def token_losses(model: Transformer, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each position [B, T]; zero where the target is ``IGNORED``."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    logits = model.head(model(ids, positions))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none").view_as(
        targets
    )


def batches(plan: Plan, tokens: Tokens, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and targets for each step, both [rows, length], from one stream of documents."""
    maker, rng = TextMaker(seed, plan.shares), random.Random(seed)
    end = 0.0
    step = 0
    for stage in plan.stages:
        end += stage.share
        text, drill = text_rows(tokens, maker, stage), drill_rows(tokens, rng, stage)
        while step < round(end * plan.steps):
            rows = [next(drill if i < stage.drill_rows else text) for i in range(stage.rows)]
            yield torch.tensor([ids for ids, _ in rows]), torch.tensor([targets for _, targets in rows])
            step += 1


def train(plan: Plan, model: Transformer, tokens: Tokens, seed: int, compiled: bool) -> None:
    """Run all steps; where the processor multiplies bfloat16, autocast takes that, 1.6 times as fast as float32."""
    narrow = torch.cpu._is_avx512_bf16_supported()
    optimizer = new_optimizer(model)
    probes = [TextMaker(seed + HELD_OUT + i).of_kind("repeat") for i in range(30)]
    fast_losses = torch.compile(token_losses) if compiled else token_losses
    started, seen, recent = time.monotonic(), 0, 0.0
    for step, (ids, targets) in enumerate(batches(plan, tokens, seed)):
        losses_of = token_losses if ids.shape[1] < COMPILED_LENGTH else fast_losses
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = losses_of(model, ids, targets).sum() / (targets != IGNORED).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += ids.numel()
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        if step % 100 == 0 or step == plan.steps - 1:
            minutes = (time.monotonic() - started) / 60
            log(f"step {step:5d} of {plan.steps}  loss {recent:.3f}  {minutes:5.1f} min  {seen / 1e6:.2f} M tokens")
        if step % 250 == 249:
            sample = generate(model, tokens, *SAMPLES[0], limit=80)
            log(f"    copies {greedy_accuracy(model, tokens, probes):.0%}; {sample}")


# ---- saving and measuring


def save(out: Path, plan: Plan, model: Transformer, tokenizer: bytes) -> None:
    """Write the three files of a checkpoint in Meta's format."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "params.json").write_text(json.dumps(plan.params) + "\n")
    (out / "tokenizer.model").write_bytes(tokenizer)
    weights = {name: tensor.detach().to(torch.bfloat16).clone() for name, tensor in model.state_dict().items()}
    torch.save(weights, out / "consolidated.00.pth")


def load(out: Path) -> Transformer:
    """The model as it was saved: rounded to bfloat16, computing in float32."""
    model = Transformer(ModelArgs.from_params(json.loads((out / "params.json").read_text())), CONTEXT)
    model.load_state_dict(torch.load(out / "consolidated.00.pth", weights_only=True))
    return model.eval()


def padded(sequences: list[list[int]], filler: int) -> torch.Tensor:
    """Sequences of different lengths as one tensor."""
    longest = max(map(len, sequences))
    return torch.tensor([s + [filler] * (longest - len(s)) for s in sequences])


@torch.no_grad()
def negative_log_likelihood(model: Transformer, tokens: Tokens, documents: list[Document]) -> tuple[float, int]:
    """Summed over all tokens after BOS, EOS among them, and how many they are."""
    total, count = 0.0, 0
    for start in range(0, len(documents), 16):
        sequences = [tokens.whole(d.text)[:CONTEXT] for d in documents[start : start + 16]]
        ids, targets = padded([s[:-1] for s in sequences], tokens.eos), padded([s[1:] for s in sequences], IGNORED)
        total += token_losses(model, ids, targets).sum().item()
        count += int((targets != IGNORED).sum())
    return total, count


@torch.no_grad()
def greedy_accuracy(model: Transformer, tokens: Tokens, documents: list[Document]) -> float:
    """Return the share of documents whose answer greedy decoding gives exactly.

    A repeated passage must also end with EOS.

    Greedy decoding yields an answer if and only if each of its tokens is the likeliest after those before it, and that
    takes one pass over prompt and answer.
    """
    exact = 0
    for document in documents:
        start = len(tokens.prompt(document.prompt))
        whole = tokens.prompt(document.prompt + document.answer) + [tokens.eos] * (
            document.kind in ("repeat", "recite", "rewrite")
        )
        ids = torch.tensor([whole])
        logits = model.head(model(ids, torch.arange(len(whole)).view(1, -1)))
        exact += bool(torch.equal(logits[0, start - 1 : -1].argmax(-1), ids[0, start:]))
    return exact / len(documents)


@torch.no_grad()
def generate(model: Transformer, tokens: Tokens, prompt: str, temperature: float, limit: int) -> str:
    """Continue a prompt: greedy at temperature 0, otherwise by top-p sampling with p = 0.95."""
    ids = tokens.prompt(prompt)
    start = len(ids)
    while len(ids) < min(start + limit, CONTEXT) and ids[-1] != tokens.eos:
        logits = model.head(model(torch.tensor([ids]), torch.arange(len(ids)).view(1, -1)))[0, -1]
        ids.append(int(logits.argmax()) if temperature == 0 else pick(logits / temperature, 0.95))
    ended = ids[-1] == tokens.eos
    # decoded together: alone, the continuation would lose its first space
    text = tokens.processor.decode(ids[1 : -1 if ended else None])
    return text[len(prompt) :] + ("" if ended else " ...")


def pick(logits: torch.Tensor, top_p: float) -> int:
    """A token drawn from the smallest set of likeliest ones whose probabilities sum to ``top_p``."""
    probabilities, order = torch.softmax(logits, -1).sort(descending=True)
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0.0
    return int(order[torch.multinomial(probabilities, 1)])


@dataclass(frozen=True)
class Report:
    """Measurements on the saved files."""

    perplexity: dict[str, float]
    accuracy: dict[str, float]
    samples: list[tuple[str, float, str]]
    shapes: int


def measure(plan: Plan, out: Path, tokens: Tokens, seed: int) -> Report:
    """Measure perplexity, accuracy and samples of the model in ``out``, on another seed's documents."""
    model = load(out)
    maker = TextMaker(seed + HELD_OUT, plan.shares)
    kinds = tuple(plan.shares)
    documents = {kind: [maker.of_kind(kind) for _ in range(plan.held_out)] for kind in kinds}
    likelihoods = {kind: negative_log_likelihood(model, tokens, documents[kind]) for kind in kinds}
    mixed = [maker.document() for _ in range(plan.held_out)]
    likelihoods["all, in training's shares"] = negative_log_likelihood(model, tokens, mixed)
    torch.manual_seed(seed)
    return Report(
        perplexity={kind: math.exp(total / count) for kind, (total, count) in likelihoods.items()},
        accuracy={kind: greedy_accuracy(model, tokens, documents[kind]) for kind in kinds if kind != "story"},
        samples=[(prompt, heat, generate(model, tokens, prompt, heat, plan.sample_length)) for prompt, heat in SAMPLES],
        shapes=count_shapes(seed, plan.shape_documents, plan.shares),
    )


# ---- README

README = """# The demo model

A toy for demonstrations and tests: a LLaMA of {parameters:.2f} million parameters that tells small stories, answers
questions about a passage and repeats text from its prompt. It knows a thousand English words and no facts; it is not
a chat model.

{files}

Shape: {shape}. Context: {context} tokens, prompt included. Tokenizer: SentencePiece BPE of {vocab} pieces
with LLaMA's settings (byte fallback, digits one by one).

## How it was made

    {command}

{went_before}Seed {seed}, {steps} steps, {tokens:.1f} million tokens,
{minutes:.0f} minutes on {cores} CPU cores. The text is generated during training by `demo_text.py` beside that script,
from templates and word lists: {shapes} distinct sentence shapes in {shape_documents} documents (wordings with names,
things and places left open). A drill in copying random tokens comes first. Names and words that are made up on the spot
make the model learn to copy rather than learn the words. The same seed gives the same text, tokenizer and order of
training; weights may differ in their last bits from machine to machine.

## What it can do

Measured on the weights as saved in bfloat16, with {held_out} held-out documents of each kind, from a seed that training
never uses. "Exact" is the share of prompts whose greedy answer equals the expected one in every token; made-up words
must come out letter by letter.

| kind | perplexity per token | exact |
| --- | --- | --- |
{table}

The perplexity of all but `story` includes the passage itself, of which little can be predicted.

Prompts that it was trained on: the beginning of a story, a passage followed by `Question: ... Answer:`, and, each with
its second half on a line of its own, `Repeat: ...` and `Copy:`, `Change Tom to Mia: ...` and `Changed:`, `Shorten: ...`
and `Short:`.

## Samples

{samples}

## License

Apache-2.0, as the rest of the project: the script generates the text; nothing was copied or downloaded.
"""

FIRST_RUN = f"python scripts/train_demo_model.py --seed 0 --steps {FULL.steps}\n    "
SECOND_RUN = f"python scripts/train_demo_model.py --go_on longer --seed 1 --steps {LONGER.steps}\n    "
EARLIER_RUNS = {"longer": FIRST_RUN, "copies": FIRST_RUN + SECOND_RUN}
WENT_BEFORE = (
    "The first command trains from nothing: 15.4 million tokens, 35 minutes. The others go on from there with longer\n"
    "passages, most of them to be repeated, word for word or with edits. Of the last one: "
)


def human(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def sample_text(prompt: str, temperature: float, continuation: str) -> str:
    """One sample in Markdown: the prompt in bold, line by line."""
    how = "greedy" if temperature == 0 else f"temperature {temperature}, top_p 0.95"
    bold = "  \n> ".join(f"**{line}**" for line in prompt.split("\n"))
    return f"{how}:\n\n> {bold}" + continuation.replace("\n", "  \n> ")


def write_readme(out: Path, plan: Plan, report: Report, options: argparse.Namespace, minutes: float) -> None:
    """Write the README with the model's description and measurements."""
    names = ("consolidated.00.pth", "tokenizer.model", "params.json")
    rows = [
        f"| {kind} | {value:.2f} | {format(report.accuracy[kind], '.1%') if kind in report.accuracy else ''} |"
        for kind, value in report.perplexity.items()
    ]
    seen = sum(stage.share * plan.steps * stage.rows * stage.length for stage in plan.stages)
    text = README.format(
        parameters=sum(p.numel() for p in load(out).parameters()) / 1e6,
        files="\n".join(f"- `{name}`: {human((out / name).stat().st_size)}" for name in names),
        shape=", ".join(f"{key} {value}" for key, value in plan.params.items()),
        context=CONTEXT,
        vocab=plan.params["vocab_size"],
        command=EARLIER_RUNS.get(options.go_on, "")
        + "python scripts/train_demo_model.py"
        + " --quick" * options.quick
        + (f" --go_on {options.go_on}" if options.go_on else "")
        + f" --seed {options.seed} --steps {plan.steps}",
        went_before=WENT_BEFORE * (options.go_on is not None),
        seed=options.seed,
        steps=plan.steps,
        tokens=seen / 1e6,
        minutes=minutes,
        cores=torch.get_num_threads(),
        shapes=report.shapes,
        shape_documents=plan.shape_documents,
        held_out=plan.held_out,
        table="\n".join(rows),
        samples="\n\n".join(sample_text(*sample) for sample in report.samples),
    )
    (out / "README.md").write_text(text)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train the demo model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("llama/demo"), help="directory to write into")
    parser.add_argument("--seed", type=int, default=0, help="of text, tokenizer, weights and samples")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the plan's own")
    parser.add_argument("--go_on", choices=tuple(GO_ON), help="train the model in --out further")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps, to test the script")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: if there is a C++ compiler"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, save, measure, and write the README."""
    options = parse_options(argv)
    plan = QUICK if options.quick else GO_ON.get(options.go_on, FULL)
    if options.steps is not None:
        plan = replace(plan, steps=options.steps)
    # compiling takes most of a minute, and makes a step 1.4 times as fast
    compiled = (not options.quick and shutil.which("g++") is not None) if options.compile is None else options.compile
    started = time.monotonic()
    if options.go_on:
        tokenizer = (options.out / "tokenizer.model").read_bytes()
        model = load(options.out).train().requires_grad_(True)
    else:
        tokenizer = train_tokenizer(options.seed, plan.tokenizer_documents, plan.params["vocab_size"])
        model = new_model(ModelArgs.from_params(plan.params), options.seed)
    tokens = Tokens(tokenizer)
    log(f"{sum(p.numel() for p in model.parameters())} parameters, {'compiled' if compiled else 'eager'}")
    train(plan, model, tokens, options.seed, compiled)
    minutes = (time.monotonic() - started) / 60
    save(options.out, plan, model, tokenizer)
    report = measure(plan, options.out, tokens, options.seed)
    log(f"perplexity {report.perplexity}\nexact {report.accuracy}\nshapes {report.shapes}")
    write_readme(options.out, plan, report, options, minutes)
    size = sum(path.stat().st_size for path in options.out.iterdir())
    if size > SIZE_LIMIT:
        raise SystemExit(f"{options.out} has {size} bytes, more than the {SIZE_LIMIT} that the repository takes")


if __name__ == "__main__":
    main()
