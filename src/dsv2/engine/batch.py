"""Answering files of prompts offline: the part of ``dsv2 generate`` that takes files and leaves one."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Unpack

from dsv2.checkpoint.identity import weights_id
from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.engine.answer_file import AnswerFile, open_answers
from dsv2.engine.gather import Gathered, run, shown
from dsv2.engine.llm import LLM
from dsv2.engine.opening import Dtype, EngineSettings, sampling_of
from dsv2.engine.prompt_files import PromptLine, read_prompts
from dsv2.engine.request import Output, Request
from dsv2.errors import DataError, Dsv2Error, RequestError
from dsv2.files import sha256_of
from dsv2.progress import say
from dsv2.tokenizer.chat import Template, content_of


def generate_files(
    path: str | Path,
    files: Sequence[str | Path],
    out: Path,
    *,
    sampling: Mapping[str, Any],
    dtype: Dtype = "auto",
    verify: bool = False,
    **settings: Unpack[EngineSettings],
) -> None:
    """Answer every prompt of some files and write the answers as JSON lines, in the order of the prompts.

    Until all are there, they are in ``OUT.part``; the same call goes on from it. An answer's line has the prompt's "id" (FILE:LINE where it
    had none), "index" (which of its n answers), "text", "tokens", "finish_reason" and "prompt_tokens"; "logprobs", "prompt_logprobs" and
    "error" where there are any.

    Args:
        path: as for ``dsv2 generate``.
        files: of prompts; see ``read_prompts``.
        out: file to write.
        sampling: fields of ``SamplingParams``, for what lines leave open; None: as generation_config.json says.
        dtype: of the weights in memory.
        verify: as for ``LLM``.
        settings: of the engine.

    Raises:
        DataError: a line cannot be used; names its file and number, and nothing has run.
        ConfigError: ``out`` is there already, or what was left of it is of another run.
        CheckpointError: no checkpoint is there.
    """
    folder = latest_checkpoint(path)
    params = sampling_of(folder, sampling)
    sources = [Path(file) for file in files]
    lines = read_prompts(sources, params)
    depends_on = {
        "model": str(folder.resolve()),
        "weights": weights_id(folder),
        "dtype": dtype,
        "cache": str(settings.get("cache", "auto")),
        "max_len": settings.get("max_len"),
        "sampling": asdict(params),
        "prompts": hashlib.sha256("".join(sha256_of(file) for file in sources).encode()).hexdigest(),
    }
    with open_answers(out, depends_on, len(lines)) as answers:
        left = [number for number in range(len(lines)) if number not in answers.present]
        if left:
            if len(left) < len(lines):
                say(f"{len(lines) - len(left)} of {len(lines)} prompts are answered in {out}.part; it goes on with the others")
            with LLM(folder, dtype=dtype, verify=verify, **settings) as llm:
                say(f"cache: {llm.engine.cache}; up to {llm.engine.max_batch} answers at once")
                _answer(llm, lines, _requests(llm, lines, params.max_tokens), answers)
        answers.finish()


def _requests(llm: LLM, lines: Sequence[PromptLine], usual: int) -> list[Request]:
    """Return a request for each line, checked; its id is the line's number."""
    requests, shortened = [], 0
    for number, line in enumerate(lines):
        params = line.params
        try:
            tokens = line.tokens(llm.tokenizer)
            room = llm.engine.max_len - len(tokens)
            if room < 1:
                raise RequestError(f"the prompt takes {len(tokens)} tokens; the context holds {llm.engine.max_len}, one of them new")
            if not line.own_length and room < params.max_tokens:
                params = replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
                shortened += 1
            request = Request(str(number), tuple(tokens), params)
            llm.engine.check(request)
        except Dsv2Error as error:
            raise DataError(f"{line.place}: {error.message}", hint=error.hint) from error
        requests.append(request)
    if shortened:
        say(f"the context of {llm.engine.max_len} tokens leaves {shortened} prompts less room than {usual} new ones")
    return requests


def _answer(llm: LLM, lines: Sequence[PromptLine], requests: Sequence[Request], answers: AnswerFile) -> None:
    missing = [request for number, request in enumerate(requests) if number not in answers.present]
    total, left = (sum(request.params.n for request in some) for some in (requests, missing))
    gathered, failed = Gathered(missing), 0
    for output in shown(run(llm.engine, missing), total, done=total - left):
        if (whole := gathered.add(output)) is not None:
            number = int(output.request_id)
            answers.add(number, [_row(lines[number], answer, llm.tokenizer.template) for answer in whole])
            failed += output.finish_reason == "error"
    if failed:
        say(f'{failed} prompts could not be answered: their lines have the finish_reason "error"')


def _row(line: PromptLine, answer: Output, template: Template | None) -> dict[str, Any]:
    text = answer.text
    if "messages" in line.asked:
        text = content_of(line.asked.get("template", template), text)
    row: dict[str, Any] = {"id": line.name, "index": answer.index, "text": text, "tokens": answer.tokens}
    row |= {"finish_reason": answer.finish_reason, "prompt_tokens": answer.prompt_tokens}
    for name in ("logprobs", "prompt_logprobs"):
        if (entries := getattr(answer, name)) is not None:
            row[name] = [asdict(entry) for entry in entries]
    return row if answer.error is None else row | {"error": answer.error}
