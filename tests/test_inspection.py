"""`vkvtrain inspect`: statistics with known answers, the page's escaping, and the command."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib.image
import pytest
import torch

from vkvtrain import EvictionConfig
from vkvtrain.cli import main
from vkvtrain.events import Event
from vkvtrain.inspection.page import page
from vkvtrain.inspection.picture import draw
from vkvtrain.inspection.survival import Survival, jaccard, policy_overlap

CONFIG = EvictionConfig(policy="snapkv", budget=6, window=2, sinks=1)
NEVER = 11


def made(*heads, policy="snapkv"):
    """One layer, ten tokens, three of them prompt."""
    config = CONFIG.model_copy(update={"policy": policy})
    return Survival(config, 3, [4], torch.tensor([heads]), [Event(0, 7, 8), Event(1, 9, 8)])


ONE = [NEVER, 8, 8, NEVER, 10, 10, NEVER, NEVER, NEVER, NEVER]
TWO = [NEVER, 8, NEVER, 8, 10, NEVER, 10, NEVER, NEVER, NEVER]


def test_statistics_with_known_answers():
    found = made(ONE, TWO)
    assert found.share()[0].tolist() == [1, 0, 0.5, 0.5, 0, 0.5, 0.5, 1, 1, 1]
    assert found.prompt_share()[0].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert found.held(9)[0, 0].tolist() == [True, False, False, True, True, True, True, True, True, False]
    # contested: positions 1 to 7; one holds {3, 6, 7}, the other {2, 5, 7}
    assert found.head_overlap().item() == pytest.approx(1 / 5)
    # events after tokens 7 and 9 with window 2: positions 1 to 5 endured both, 6 and 7 one
    twice, once = 3 / 10, 3 / 4
    expected = 5 * twice**2 + 2 * once**2, 5 * (2 * twice - twice**2) + 2 * (2 * once - once**2)
    assert found.overlap_by_chance() == pytest.approx(expected[0] / expected[1])
    other = made(TWO, TWO, policy="tova")
    assert policy_overlap(found, other).item() == pytest.approx((1 / 5 + 1) / 2)
    assert policy_overlap(found, found).item() == 1
    assert made(ONE).head_overlap().isnan().all()


def test_jaccard():
    left, right = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool(), torch.tensor([[1, 0, 1], [0, 0, 0]]).bool()
    assert jaccard(left, right).tolist() == pytest.approx([1 / 3, 1])


class Spans(HTMLParser):
    """Texts of the token spans, and every tag that the page has."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.inside = [], [], False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag == "span" and ("tabindex", "0") in attrs
        if self.inside:
            self.texts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data


def test_text_of_models_and_data_is_escaped():
    tokens = ["<script>", "alert(1)", "</script>", "&amp;", '"', "'", "<img src=x onerror=y>", "\n", "é", "}}{{ 7*7 }}"]
    html = page([made(ONE, TWO), made(TWO, TWO, policy="tova")], tokens, model="<b>model</b>")
    parser = Spans()
    parser.feed(html)
    assert parser.texts == tokens
    assert parser.tags.count("script") == 2
    assert "img" not in parser.tags
    assert "b" not in parser.tags
    assert not re.search(r"(src|href)=", html.replace("&lt;img src=x", ""))  # nothing is loaded from elsewhere
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', html).group(1)
    assert json.loads(data) == [[[ONE, TWO]], [[TWO, TWO]]]


def test_the_picture_has_a_panel_for_each_setting_and_one_for_the_difference(tmp_path):
    heights = []
    for settings in ([made(ONE, TWO)], [made(ONE, TWO), made(TWO, TWO, policy="tova")]):
        draw(settings, tmp_path / "picture.png")
        image = matplotlib.image.imread(tmp_path / "picture.png")
        heights.append(image.shape[0])
        assert image.shape[1] == 11 * 130
        assert image.std() > 0.05
    assert heights[1] > 2 * heights[0]


def test_the_command_on_the_embedded_model(tmp_path, capsys):
    assert main(["inspect", "--compare", "random", "--budget", "64", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "vase_attnv: 6 evictions" in printed
    assert "vase_attnv and random hold the same tokens" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    ours, theirs = summary["settings"]
    assert (ours["setting"]["policy"], theirs["setting"]["policy"]) == ("vase_attnv", "random")
    assert [row["layer"] for row in ours["layers"]] == [0, 1, 2, 3]
    assert ours["tokens"] == 171
    assert ours["prompt_tokens"] == 37
    assert len(summary["policy_overlap"]) == 4
    assert all(0 < overlap < 1 for overlap in summary["policy_overlap"])
    for row in theirs["layers"]:  # independent draws: the overlap of heads is that of chance
        assert row["head_overlap"] == pytest.approx(theirs["head_overlap_by_chance"], abs=0.06)
    assert (tmp_path / "survival.png").stat().st_size > 10_000
    assert "</html>" in (tmp_path / "tokens.html").read_text()


def test_the_prompt_is_kept_when_it_is_protected(tmp_path):
    arguments = ["--policy", "random", "--protect-prompt", "--budget", "64", "--output", str(tmp_path)]
    assert main(["inspect", *arguments]) == 0
    (setting,) = json.loads((tmp_path / "summary.json").read_text())["settings"]
    assert all(row["prompt_held"]["min"] == 1 for row in setting["layers"])


def test_a_text_from_a_file_is_cut_and_says_so(tmp_path, capsys):
    (tmp_path / "text").write_text("a1b2c3d4e5f6g7h8" * 20)
    arguments = ["--text", str(tmp_path / "text"), "--max-tokens", "100", "--budget", "48", "--prompt-tokens", "9"]
    assert main(["inspect", *arguments, "--output", str(tmp_path / "out")]) == 0
    assert "only the first 100 (--max-tokens)" in capsys.readouterr().out
    (setting,) = json.loads((tmp_path / "out/summary.json").read_text())["settings"]
    assert (setting["tokens"], setting["prompt_tokens"]) == (100, 9)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policy", "vase_atnv"], "did you mean 'vase_attnv'"),
        (["--compare", "snapvk"], "did you mean 'snapkv'"),
        (["--policy", "full"], "keeps everything"),
        (["--budget", "50"], "multiple of window (16)"),
        (["--budget", "400"], "nothing is ever evicted; lower --budget"),
        (["--text", "nowhere.txt"], "'nowhere.txt' cannot be read"),
        (["--text", "EMPTY"], "is empty: give a text"),
        (["--model", "no/where"], "--text is required"),
        (["--policy-args", "rank"], "--policy-args 'rank' is not JSON"),
        (["--policy-args", '{"rank": 3}'], "has no argument 'rank'"),
        (["--prompt-tokens", "0"], "--prompt-tokens 0 must be from 1"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, arguments, says):
    (tmp_path / "empty").write_text(" \n")
    arguments = [str(tmp_path / "empty") if word == "EMPTY" else word for word in arguments]
    assert main(["inspect", *arguments, "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("vkvtrain inspect: ")
    assert says in message
    assert not (tmp_path / "out").exists()


def test_help_is_quick_and_names_the_command():
    loaded = "import sys, vkvtrain.cli as c; c.main(['--help']); sys.exit('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "inspect" in done.stdout
