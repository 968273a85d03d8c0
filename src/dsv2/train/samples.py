"""What a run lets the model write on the way, as data; who writes stands downstream (``dsv2.samples``)."""

from pydantic import Field

from dsv2.config import Section


class Hole(Section):
    """A place to fill in: the model sees what stands before and after it."""

    prefix: str = Field(description="text before the hole")
    suffix: str = Field(description="text after it")


class SamplesSection(Section):
    """Prompts that a run continues every ``run.sample_every`` steps, for metrics and report."""

    prompts: tuple[str, ...] = Field(
        default=("Once upon a time", "\u4e2d\u56fd\u7684", "def __init__(self", "Let $x$ be"), description="texts to continue"
    )
    fill: tuple[Hole, ...] = Field(default=(), description="holes to fill, for a model that learnt fill-in-the-middle")
    max_tokens: int = Field(default=48, gt=0, description="tokens of each sample, at most")
    temperature: float = Field(default=0.7, ge=0, description="of sampling; 0: the most probable token")
    top_p: float = Field(default=0.95, gt=0, le=1, description="share of probability to sample from")
