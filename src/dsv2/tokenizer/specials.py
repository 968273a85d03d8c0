"""The markers of the DeepSeek-V2 family, in the order of their published ids (section 4.4 of the specification).

A marker is one id outside the merges. It stands for structure (a role, a tool call, the end of a text) and never comes from what a
user writes. The bars are U+FF5C and the blanks U+2581; only ``EOT``, which is older, is plain ASCII.
"""


def _marker(words: str) -> str:
    return f"<\uff5c{words.replace(' ', chr(0x2581))}\uff5c>"


BOS = _marker("begin of sentence")
EOS = _marker("end of sentence")
FIM_HOLE = _marker("fim hole")
FIM_BEGIN = _marker("fim begin")
FIM_END = _marker("fim end")
COMPLETION = _marker("completion")
USER = _marker("User")
ASSISTANT = _marker("Assistant")
EOT = "<|EOT|>"
CALLS_BEGIN = _marker("tool calls begin")
CALLS_END = _marker("tool calls end")
CALL_BEGIN = _marker("tool call begin")
CALL_END = _marker("tool call end")
OUTPUTS_BEGIN = _marker("tool outputs begin")
OUTPUTS_END = _marker("tool outputs end")
OUTPUT_BEGIN = _marker("tool output begin")
OUTPUT_END = _marker("tool output end")
SEP = _marker("tool sep")

# V2.5's published order: their ids follow the last merge, 100000 to 100017 in the released files.
MARKERS: tuple[str, ...] = (
    BOS,
    EOS,
    FIM_HOLE,
    FIM_BEGIN,
    FIM_END,
    COMPLETION,
    USER,
    ASSISTANT,
    EOT,
    CALLS_BEGIN,
    CALLS_END,
    CALL_BEGIN,
    CALL_END,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    OUTPUT_BEGIN,
    OUTPUT_END,
    SEP,
)

# Only these carry "special": true in the released files. A library that skips special tokens therefore still prints the others, and
# one that is told not to parse special tokens still parses them: our encoder and decoder go by MARKERS, not by this flag.
FLAGGED_SPECIAL = frozenset({BOS, EOS, EOT})
