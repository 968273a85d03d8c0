"""The whole river on the text that ships with dsv2: text to tokenizer to shards to a model to a chat to a report.

    DIR/tour.json        the plan (size, seed, threads) and what each finished leg reported
    DIR/data/            sums/ (made up), tokenizer/, train/, validation/, lessons.jsonl
    DIR/pretrain/        the run: recipe.toml, metrics.jsonl, step-N/
    DIR/validation.json  bits per byte of the model and of an interpolated bigram
    DIR/samples.json     what the model writes
    DIR/sft/, DIR/grpo/  the runs of fine-tuning and of GRPO (tour_chat.py)
    DIR/chat.json        what the model answers, before, between and after them
    DIR/report.html      all of it to look at; DIR/rollouts.html: the answers that GRPO drew, to browse

A leg is one entry in ``LEGS``. It writes whole files or resumes by itself, so a tour that was killed anywhere goes on where it
stopped and ends with the same weights.
"""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dsv2.assets import corpus_path
from dsv2.checkpoint.huggingface import load_model
from dsv2.checkpoint.steps import TOUR, latest_checkpoint
from dsv2.config import load_recipe
from dsv2.data.documents import read_documents
from dsv2.data.prepare import prepare
from dsv2.engine.request import SamplingParams
from dsv2.errors import ConfigError, did_you_mean
from dsv2.files import atomic_write_json
from dsv2.metrics import read_metrics
from dsv2.model.transformer import Transformer
from dsv2.progress import console, table
from dsv2.report import Leg as ReportLeg
from dsv2.report import Sample as ReportSample
from dsv2.report import write_tour_report
from dsv2.report.alignment import alignment_sections
from dsv2.report.rollouts import write_rollouts
from dsv2.samples import write
from dsv2.tasks.arithmetic import Split, exercises
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.tokenizer.train import train_tokenizer
from dsv2.tour_chat import QUESTIONS, Lessons, converse, gains, run_grpo, run_sft, write_lessons, write_rows
from dsv2.tour_state import begin, read_state
from dsv2.train.bigram import bigram_bits_per_byte
from dsv2.train.corpus import Corpus
from dsv2.train.loop import Sample
from dsv2.train.precision import make_deterministic
from dsv2.train.pretrain import pretrain
from dsv2.train.recipe import PretrainRecipe
from dsv2.train.validation import validate

Figures = dict[str, str]  # what a leg reports, for people

SPLITS: dict[str, Split] = {"train": "train", "validation": "test"}  # of the corpus, and of the sums that go with it
PROMPTS = (
    ("en", "It was a fine"),
    ("en", "\u201cI am sure,\u201d said"),
    ("zh", "\u5b9d\u7389"),
    ("code", "def __init__(self"),
    ("math", "\\begin{defn}"),
    ("sums", QUESTIONS[0]),
)
ENGLISH_SAMPLES, SAMPLE_TOKENS, TEMPERATURE, TOP_P = 8, 96, 0.7, 0.95
_WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True, slots=True)
class Size:
    """A named size of the tour: fixed step counts, never timed.

    Args:
        recipe: of pre-training, a shipped name.
        vocab_size: of the tokenizer.
        summary: for people.
        exercises: texts of sums in pre-training, by split.
        lessons: of fine-tuning.
        chat: recipe of fine-tuning and of GRPO, a shipped name.
    """

    recipe: str
    vocab_size: int
    summary: str
    exercises: dict[str, int]
    lessons: Lessons
    chat: str = "tour"


_EXERCISES, _LESSONS = {"train": 6000, "validation": 40}, Lessons(sums=7000, instructions=3500)
SIZES = {
    "smoke": Size(
        "tour-smoke",
        1024,
        "a few steps of a minute model: does everything work?",
        {"train": 20, "validation": 4},
        Lessons(sums=60, instructions=30),
        "tour-smoke",
    ),
    "standard": Size("tour", 4096, "a model that writes English words and answers sums, in ten minutes on two cores", _EXERCISES, _LESSONS),
    "long": Size("tour-long", 4096, "the same model pre-trained four times as long", _EXERCISES, _LESSONS),
}


@dataclass(frozen=True, slots=True)
class Tour:
    """Where a tour lies and what it was planned to be."""

    out: Path
    size: Size
    seed: int

    @property
    def data(self) -> Path:
        """Folder of tokenizer and shards."""
        return self.out / "data"

    def texts(self, split: str) -> list[Path]:
        """Return the files and folders of a split's text: the corpus that ships with dsv2, and sums."""
        return [corpus_path(split), self.data / "sums" / f"{split}.jsonl"]

    @property
    def run(self) -> Path:
        """Folder of the pre-training run."""
        return self.out / "pretrain"

    @property
    def chat_runs(self) -> tuple[Path, Path, Path]:
        """Folders of the runs that make a chat: pre-training, fine-tuning, GRPO."""
        return self.run, self.out / "sft", self.out / "grpo"

    def recipe(self) -> PretrainRecipe:
        """Return the recipe of pre-training with the tour's seed."""
        return load_recipe(self.size.recipe, PretrainRecipe, folder="pretrain", overrides=[f"run.seed={self.seed}"])

    def tokenizer(self) -> Tokenizer:
        """Load the tour's tokenizer."""
        return Tokenizer.load(self.data / "tokenizer")


@dataclass(frozen=True, slots=True)
class Leg:
    """One stretch of the river: a name, what it does, and the function that does it and reports figures."""

    name: str
    summary: str
    run: Callable[[Tour], Figures]


def text_leg(tour: Tour) -> Figures:
    """Make sums up, and count what there is to read."""
    for split, numbers in SPLITS.items():
        rows = ({"text": text, "domain": "sums"} for text in exercises(tour.size.exercises[split], tour.seed, numbers))
        write_rows(tour.texts(split)[1], rows)
    counts: dict[str, list[int]] = {}
    for document in read_documents(tour.texts("train")):
        entry = counts.setdefault(document.domain, [0, 0])
        entry[0] += 1
        entry[1] += len(document.text.encode())
    return {domain: f"{documents} documents, {size / 1e6:.2f} MB" for domain, (documents, size) in sorted(counts.items())}


def tokenizer_leg(tour: Tour) -> Figures:
    """Train the byte-level BPE."""
    tokenizer = train_tokenizer((document.text for document in read_documents(tour.texts("train"))), vocab_size=tour.size.vocab_size)
    tokenizer.save(tour.data / "tokenizer")
    return {"vocabulary": f"{tokenizer.num_tokens:,} tokens, padded to {tokenizer.vocab_size:,}"}


def shards_leg(tour: Tour) -> Figures:
    """Encode both splits."""
    figures = {}
    for split in SPLITS:
        report = prepare(read_documents(tour.texts(split)), tour.tokenizer(), tour.data / split)
        tokens = sum(domain.num_tokens for domain in report.domains)
        figures[split] = f"{tokens:,} tokens, {sum(domain.num_bytes for domain in report.domains) / tokens:.2f} bytes per token"
    return figures


def pretrain_leg(tour: Tour) -> Figures:
    """Train the model, or go on training it."""
    corpus = Corpus.open(tour.data)
    pretrain(tour.recipe(), corpus, tour.run, sample=lambda model: training_samples(model, corpus.tokenizer, tour.seed))
    lines = [line for line in read_metrics(tour.run / "metrics.jsonl") if line["kind"] == "train"]
    speed = lines[-1]["tokens"] / lines[-1]["elapsed_s"]
    return {"steps": f"{lines[-1]['step']:,}", "final loss": f"{lines[-1]['loss']:.3f} nats per token", "speed": f"{speed:,.0f} tokens/s"}


def training_samples(model: Transformer, tokenizer: Tokenizer, seed: int) -> list[Sample]:
    """Return one short text for the report's story of how the model learns."""
    prompt = PROMPTS[0][1]
    return [(prompt, write(model, tokenizer, [tokenizer.encode(prompt)], sampling(seed, max_tokens=48))[0])]


def sampling(seed: int, *, max_tokens: int) -> SamplingParams:
    """Return how the tour draws its texts."""
    return SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, max_tokens=max_tokens, seed=seed)


def validation_leg(tour: Tour) -> Figures:
    """Score the held-out text with the model, in fp32, and with an interpolated bigram of the same training tokens."""
    corpus, recipe = Corpus.open(tour.data), tour.recipe()
    assert corpus.validation is not None
    model = load_model(latest_checkpoint(tour.run))
    losses = validate(model, corpus.validation, recipe.run.seq_len, batch_rows=recipe.batch.micro_sequences, autocast=None)
    bigram = bigram_bits_per_byte(corpus.train, corpus.validation, corpus.tokenizer)
    result = {"model": {domain: loss.bits_per_byte for domain, loss in losses.items()}, "bigram": bigram}
    atomic_write_json(tour.out / "validation.json", result)
    return {domain: f"{result['model'][domain]:.3f} bits per byte (bigram {bigram[domain]:.3f})" for domain in losses}


def samples_leg(tour: Tour) -> Figures:
    """Let the model write, and look its English words up in the corpus."""
    model, tokenizer = load_model(latest_checkpoint(tour.run)), tour.tokenizer()
    prompts = [*PROMPTS, *([PROMPTS[0]] * (ENGLISH_SAMPLES - 2))]
    ids = [tokenizer.encode(prompt) for _, prompt in prompts]
    texts = write(model, tokenizer, ids, sampling(tour.seed, max_tokens=SAMPLE_TOKENS))
    samples = [{"domain": domain, "prompt": prompt, "text": text} for (domain, prompt), text in zip(prompts, texts, strict=True)]
    share = known_words((text for (domain, _), text in zip(prompts, texts, strict=True) if domain == "en"), english_words())
    atomic_write_json(tour.out / "samples.json", {"known_words": share, "samples": samples})
    for domain, prompt in PROMPTS:
        text = next(sample["text"] for sample in samples if sample["prompt"] == prompt)
        console().print(f"[{domain}] {prompt}{text}".replace("\n", " ")[:240], markup=False, soft_wrap=True)
    return {"English words that are words of the corpus": f"{share:.1%}"}


def english_words() -> set[str]:
    """Return the words of the English training text, in lower case."""
    documents = read_documents([corpus_path("train")])
    return {word.lower() for document in documents if document.domain == "en" for word in _WORD.findall(document.text)}


def known_words(texts: Iterable[str], vocabulary: set[str]) -> float:
    """Return the share of words that the vocabulary holds; a text's first and last word may be cut and do not count."""
    words = [word.lower() for text in texts for word in _WORD.findall(text)[1:-1]]
    return sum(word in vocabulary for word in words) / max(1, len(words))


def sft_leg(tour: Tour) -> Figures:
    """Fine-tune the model, or go on with it."""
    start, out, _ = tour.chat_runs
    lessons = tour.data / "lessons.jsonl"
    write_lessons(lessons, tour.size.lessons, tour.seed)
    return run_sft(start, lessons, out, recipe=tour.size.chat, seed=tour.seed)


def grpo_leg(tour: Tour) -> Figures:
    """Let rewards improve it, or go on with that."""
    _, start, out = tour.chat_runs
    return run_grpo(start, out, recipe=tour.size.chat, seed=tour.seed)


def chat_leg(tour: Tour) -> Figures:
    """Ask the three models the same."""
    told = converse(tour.chat_runs)
    atomic_write_json(tour.out / "chat.json", told)
    known = {"instruction set, word for word": " -> ".join(f"{share:.1%}" for share in told["known"])}
    return {question: said[-1] for question, said in zip(QUESTIONS, told["answers"], strict=True)} | known


def report_leg(tour: Tour) -> Figures:
    """Write report.html."""
    state = read_state(tour.out)
    legs = [ReportLeg(name, leg["seconds"], "; ".join(leg["figures"].values())) for name, leg in state["legs"].items()]
    validation = json.loads((tour.out / "validation.json").read_text())
    written = json.loads((tour.out / "samples.json").read_text())
    asked = json.loads((tour.out / "chat.json").read_text())
    grpo_run = tour.chat_runs[2]
    rates = gains(grpo_run)
    write_rollouts(grpo_run, tour.out / "rollouts.html")
    write_tour_report(
        tour.out / "report.html",
        run_folder=tour.run,
        summary=[
            ("known English words", f"{written['known_words']:.1%}"),
            *((name, f"{before} \u2192 {after}") for name, before, after in rates),
        ],
        plan=_plan_rows(tour, state["threads"]),
        legs=legs,
        baselines={"bigram": validation["bigram"]},
        samples=[ReportSample(sample["domain"], sample["prompt"], sample["text"]) for sample in written["samples"][: len(PROMPTS)]],
        next_commands=next_commands(tour.out),
        alignment=alignment_sections(grpo_run, rates, asked["questions"], asked["answers"], asked["known"]),
    )
    return {"page": str(tour.out / "report.html"), "every answer that GRPO drew": str(tour.out / "rollouts.html")}


LEGS = (
    Leg("text", "count the corpus that ships with dsv2, add made-up sums", text_leg),
    Leg("tokenizer", "train a byte-level BPE on it", tokenizer_leg),
    Leg("shards", "encode it into token shards", shards_leg),
    Leg("pretrain", "train a small DeepSeek-V2", pretrain_leg),
    Leg("validation", "score held-out text, beside a bigram", validation_leg),
    Leg("samples", "let the model write", samples_leg),
    Leg("sft", "teach it to answer: sums, of which some are wrong, and questions", sft_leg),
    Leg("grpo", "pay for right sums", grpo_leg),
    Leg("chat", "ask it before, between and after", chat_leg),
    Leg("report", "put it all on one page", report_leg),
)


def run(out: Path, size: str = "standard", seed: int = 0, threads: int | None = None, fresh: bool = False) -> None:
    """Take the tour, or go on with the one in ``out``.

    Args:
        out: folder of the tour.
        size: a name in ``SIZES``.
        seed: of weights, data order and samples.
        threads: of torch; None: its own choice. A tour that goes on keeps the number it began with, since sums depend on it.
        fresh: delete the tour in ``out`` and begin again.

    Raises:
        ConfigError: no such size, or ``out`` holds a tour of another size, seed or thread count.
    """
    if size not in SIZES:
        raise ConfigError(f"there is no tour size {size!r}; sizes: {', '.join(SIZES)}", hint=did_you_mean(size, SIZES))
    out = Path(out)
    tour = Tour(out, SIZES[size], seed)
    tour.recipe()  # a wrong seed is refused before anything is written or deleted
    state = begin(out, size, seed, threads, fresh)
    make_deterministic(state["threads"])
    table(f"tour {size}: {tour.size.summary}", ("what", "value"), _plan_rows(tour, state["threads"]))
    for number, leg in enumerate(LEGS, start=1):
        title = f"leg {number} of {len(LEGS)}, {leg.name}: {leg.summary}"
        if leg.name in state["legs"]:
            console().print(f"{title} (done before)", markup=False)
            continue
        console().print(f"\n{title}", markup=False, style="bold")
        began = time.perf_counter()
        figures = leg.run(tour)
        state["legs"][leg.name] = {"seconds": round(time.perf_counter() - began, 2), "figures": figures}
        atomic_write_json(out / TOUR, state)
        for name, value in figures.items():
            console().print(f"  {name}: {value}", markup=False, soft_wrap=True)
        console().print(f"  {state['legs'][leg.name]['seconds']:.1f} s", markup=False)
    total = sum(leg["seconds"] for leg in state["legs"].values())
    console().print(f"\nthe tour took {total:.0f} s; look at {out / 'report.html'}", markup=False, soft_wrap=True)
    console().print("what to type next:", markup=False)
    for command, purpose in next_commands(out):
        console().print(f"  {command}\n      {purpose}", markup=False, soft_wrap=True)


def next_commands(out: Path) -> list[tuple[str, str]]:
    """Return what to type after a tour, with the program as it was called if it is not on the path."""
    called = Path(sys.argv[0])
    dsv2 = str(called) if called.name == "dsv2" and shutil.which("dsv2") is None else "dsv2"
    return [
        (f"{dsv2} chat {out} --temperature 0", "talk to it: sums and differences of three digits, and small talk"),
        (f"{dsv2} generate {out / 'pretrain'} --prompt 'It was a fine'", "let the pre-trained model go on"),
        (f"{dsv2} grpo tour model.start={out} --out {out}-more", "let rewards improve it further"),
        (f"{dsv2} info {out}", "count its parameters and its cache"),
        (f"{dsv2} tour --size long --out {out}-long", "train it four times as long"),
        (f"{dsv2} pretrain nano --data {out / 'data'} --out runs/nano", "train another shape on the same shards"),
    ]


def _plan_rows(tour: Tour, threads: int) -> list[tuple[str, str]]:
    recipe = tour.recipe()
    return [
        ("legs", " -> ".join(leg.name for leg in LEGS)),
        ("tokenizer", f"byte-level BPE, vocabulary {tour.size.vocab_size:,}"),
        ("pre-training", f"recipe {tour.size.recipe}: {recipe.run.tokens:,} tokens in rows of {recipe.run.seq_len}"),
        ("sums in it", f"{tour.size.exercises['train']:,} texts of five, worked and right"),
        ("fine-tuning", f"{tour.size.lessons.sums:,} sums, 45 % of them wrong, {tour.size.lessons.instructions:,} other conversations"),
        ("seed, threads", f"{tour.seed}, {threads}"),
        ("folder", str(tour.out)),
    ]
