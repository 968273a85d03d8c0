"""The page of rollouts: everything escaped, nothing loaded, no script but its own; a long run is cut to whole groups with a note."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest

from dsv2.errors import DataError
from dsv2.report.rollouts import write_rollouts

EVIL = "</blockquote></div><script>document.title='taken'</script><img src=x onerror=alert(1)> & \" ' </script>"


def row(step, group, index, **fields):
    reward = float((step + index) % 3 == 0)
    known = {"prompt": [{"role": "user", "content": f"What is {group} + 1?"}], "example": {"answer": str(group + 1)}}
    return {
        "step": step, "kind": "rollout", "group": group, "index": index, **({} if index else known),
        "text": f"answer {step}-{group}-{index}", "reward": reward, "rewards": {"answer": reward}, "advantage": reward - 0.5,
        "num_tokens": 3 + index, "finish_reason": "stop", "learned": True,
    } | fields  # fmt: skip


def page_of(folder, rows, **options):
    folder.mkdir(exist_ok=True)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows), encoding="utf8")
    write_rollouts(folder, folder / "page.html", **options)
    return (folder / "page.html").read_text(encoding="utf8")


class Tags(HTMLParser):
    """Collects tags with their attributes and the text of the page; the content of a script is data, as in a browser."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_hostile_texts_stay_texts(tmp_path):
    fields = {
        "text": EVIL, "prompt": [{"role": EVIL, "content": EVIL}], "finish_reason": EVIL, "example": {EVIL: EVIL, "tests": [EVIL]},
        "rewards": {EVIL: 1.0, "b": None},
    }  # fmt: skip
    html = page_of(tmp_path / "evil<b>", [row(1, 0, 0, **fields), row(1, 1, 0, prompt=EVIL)])
    page = Tags(html)
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 1 and not {"img", "link", "iframe", "b onerror"} & set(names)
    assert not any(name.startswith("on") or name in ("src", "href") for _, attributes in page.tags for name in attributes)
    assert page.text.count(EVIL) >= 5, "all of it is there to read"
    policy = next(attributes["content"] for _, attributes in page.tags if attributes.get("http-equiv"))
    script = html[html.index("<script>") + 8 : html.index("</script>")]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'") and not re.search(r"\b(https?:)?//\w", script)


def test_groups_show_prompt_truth_and_what_each_answer_earned(tmp_path):
    rows = [row(step, group, index) for step in (1, 2) for group in range(3) for index in range(4)]
    rows[5] |= {"reward": None, "rewards": {"answer": None, "format": 0.25}, "advantage": 0.0, "learned": False}
    rows[6] |= {"steps": [{"end": 1, "reward": 0.125, "advantage": 0.7}, {"end": 4, "reward": 1.0, "advantage": -0.2}]}
    html = page_of(tmp_path / "run", rows)
    assert html.count('class="group"') == 6 and html.count('class="answer') == 24
    text = unescape(re.sub(r"<[^>]*>", " ", html))
    for said in (
        "Rollouts of run",
        "What is 2 + 1?",
        "answer: 3",
        "answer 2-2-3",
        "no score",
        "format 0.25",
        "not learned from",
        "advantage -0.50",
        "steps 0.125 (+0.70), 1 (-0.20)",
    ):
        assert said in text
    assert "mean reward, step 2" in text and "taken evenly" not in text
    assert 'data-differ="1"' in html and 'data-reward=""' in html


def test_a_long_run_is_cut_to_whole_groups_over_all_of_it(tmp_path):
    rows = [row(step, group, index) for step in range(1, 51) for group in range(4) for index in range(5)]
    html = page_of(tmp_path / "run", rows, most=100)
    assert html.count('class="group"') == 20 and html.count('class="answer') == 100
    assert "Shown are 100 of its 1,000 rollouts" in html
    steps = [int(step) for step in re.findall(r'data-step="(\d+)"', html)]
    assert steps[0] == 1 and steps[-1] == 50 and len(set(steps)) == 20
    long = page_of(tmp_path / "long", [row(1, 0, 0, text="x" * 9000)])
    assert "3,000 more characters" in long and "x" * 6001 not in long


def test_a_torn_last_line_is_left_out_and_a_damaged_one_named(tmp_path):
    page_of(tmp_path / "run", [row(1, 0, 0)])
    path = tmp_path / "run" / "rollouts.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "gro')
    write_rollouts(tmp_path / "run", tmp_path / "page.html")
    path.write_text("[]\n" + path.read_text())
    with pytest.raises(DataError, match=r"rollouts\.jsonl:1: not a rollout"):
        write_rollouts(tmp_path / "run", tmp_path / "page.html")
    path.write_text("")
    with pytest.raises(DataError, match="holds no rollout"):
        write_rollouts(tmp_path / "run", tmp_path / "page.html")
    with pytest.raises(DataError, match="there are no rollouts"):
        write_rollouts(tmp_path, tmp_path / "page.html")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_runs_the_pages_script_and_no_other(tmp_path):
    page_of(tmp_path / "run", [row(1, 0, 0, text=EVIL), row(1, 1, 0)])
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", (tmp_path / "run" / "page.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "2 of 2 groups" in shown and "<title>Rollouts of run</title>" in shown
