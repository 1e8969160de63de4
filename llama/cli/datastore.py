"""The command `llama-xla datastore`: make the file of texts that retrieval drafts from, or show what one holds."""

from __future__ import annotations

import json as json_lib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.cli.flags import one_of
from llama.cli.output import counted, json_line, log, log_to_stderr, write
from llama.config import DEMO_DIR
from llama.errors import DatastoreError, FlagError, PromptError

if TYPE_CHECKING:
    from llama.drafting.datastore import Contents
    from llama.tokenizer import Tokenizer

ACTIONS = ("build", "inspect")
EXPECTED = '{"text": "..."}, {"token_ids": [...]}, or {"prompt": "...", "generation": "..."}'


def datastore(
    action: str,
    path: str,
    *,
    output: str | None = None,
    tokenizer_path: str | None = None,
    check_sums: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Make a datastore, from which retrieval drafts, or show what one holds.

    llama-xla datastore build corpus.jsonl --tokenizer_path path/to/tokenizer.model -o store
    llama-xla datastore inspect store

    Every line of the corpus is a text {"text": "..."}, ids {"token_ids": [...]}, or a result as generate --json prints
    it, whose prompt and tokens become one text.

    Flags:
        action: build or inspect; the name of the flag may be left out.
        path: The corpus to build from, or the datastore to inspect; the name of the flag may be left out.
        output: Where build writes the datastore; one that is there is replaced. Also -o.
        tokenizer_path: The tokenizer of the model that will use it; inspect compares it with the datastore's. Default
            of build: the demo model's.
        check_sums: When inspecting, read the whole file and compare it with its checksum.
        json: Print one JSON object of what it holds.
        quiet: Log nothing to stderr.
    """
    from llama.drafting.datastore import KIND, contents
    from llama.drafting.files import check_fingerprint, fingerprint

    log_to_stderr(quiet)
    if one_of("action", action, ACTIONS) == "build":
        found = _build(Path(path), output, tokenizer_path)
        if json:
            write(json_line(_as_json(output or "", found)))
        return
    if output is not None:
        raise FlagError(f"--output: got {output!r}, but inspect writes no file; leave it out")
    found = contents(Path(path), check_sum=check_sums)
    if tokenizer_path is not None:
        check_fingerprint(Path(path), KIND, found.fingerprint, fingerprint(_tokenizer(tokenizer_path)))
    write(json_line(_as_json(path, found)) if json else _table(found))


datastore.short = {"o": "output"}  # type: ignore[attr-defined]


def _build(corpus: Path, output: str | None, tokenizer_path: str | None) -> Contents:
    """Make a datastore and log what it took."""
    from llama.drafting.datastore import KIND, build
    from llama.drafting.files import check_target, fingerprint

    if output is None:
        raise FlagError("--output is needed: where to write the datastore, for instance -o store")
    check_target(Path(output), KIND)
    tokenizer = _tokenizer(tokenizer_path)
    start = time.perf_counter()
    found = build(_documents(corpus, tokenizer), fingerprint(tokenizer), Path(output))
    log.info(
        "%s: %d tokens, %s, %d bytes, made in %.1f seconds",
        output,
        found.tokens - found.documents,
        counted(found.documents, "document"),
        found.file_bytes,
        time.perf_counter() - start,
    )
    return found


def _tokenizer(path: str | None) -> Tokenizer:
    from llama.tokenizer import find_tokenizer, load_tokenizer

    return load_tokenizer(find_tokenizer(DEMO_DIR) if path is None else path)


def _documents(corpus: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The token ids of each line; blank lines, and the pieces of a streamed result, are skipped.

    Raises:
        DatastoreError: the file cannot be read, or a line is not as it should be.
    """
    try:
        with corpus.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield from _document(line, tokenizer, f"{corpus}, line {number}")
    except OSError as error:
        raise DatastoreError(f"no corpus at {corpus} ({error.strerror}); expected a file of JSON lines") from error


def _document(line: bytes, tokenizer: Tokenizer, where: str) -> Iterator[list[int]]:
    """The token ids of one line; nothing for a piece of a streamed result, which comes again as a whole."""
    try:
        value = json_lib.loads(line)
    except (ValueError, RecursionError) as error:
        raise DatastoreError(f"{where}: not JSON ({error}); expected {EXPECTED}") from error
    if not isinstance(value, dict):
        raise DatastoreError(f"{where}: got a JSON {type(value).__name__}, expected {EXPECTED}")
    if "piece" in value:
        return
    try:
        yield _ids(value, tokenizer)
    except (DatastoreError, PromptError) as error:
        raise DatastoreError(f"{where}: {error}") from error


def _ids(value: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The token ids of one line's object. Those of a result are taken as the model wrote them."""
    ids = None if value.get("token_ids") is None else _checked(value["token_ids"], tokenizer)
    if isinstance(value.get("text"), str):
        return tokenizer.encode(value["text"])
    if isinstance(value.get("prompt"), str) and ids is not None:
        return tokenizer.encode(value["prompt"]) + ids
    if isinstance(value.get("prompt"), str) and isinstance(value.get("generation"), str):
        return tokenizer.encode(value["prompt"] + value["generation"])
    if ids is None:
        raise DatastoreError(f"got the keys {', '.join(sorted(value)) or 'none'}, expected {EXPECTED}")
    return ids


def _checked(ids: Any, tokenizer: Tokenizer) -> list[int]:
    """Refuse what is no list of the tokenizer's ids."""
    if not isinstance(ids, list):
        raise DatastoreError(f"token_ids: got a JSON {type(ids).__name__}, expected a list of token ids")
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < tokenizer.n_words:
            raise DatastoreError(
                f"token_ids: got {token_id!r}, expected whole numbers below {tokenizer.n_words}; "
                "are the ids another tokenizer's?"
            )
    return ids


def _as_json(path: str, found: Contents) -> dict[str, Any]:
    return {
        "path": path,
        "tokens": found.tokens - found.documents,
        "documents": found.documents,
        "bytes": found.file_bytes,
        "token_bytes": found.token_bytes,
        "vocab_size": found.fingerprint.vocab_size,
        "fingerprint": found.fingerprint.digest.hex(),
    }


def _table(found: Contents) -> str:
    """What a datastore holds, a line for each."""
    rows = {
        "tokens": found.tokens - found.documents,
        "documents": found.documents,
        "file": f"{found.file_bytes} bytes",
        "a token": f"{found.token_bytes} bytes",
        "vocabulary": found.fingerprint,
    }
    return "".join(f"{name:12}{value}\n" for name, value in rows.items())
