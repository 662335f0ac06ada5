"""report.html: what it says, in which order, and that a real browser shows it."""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from comparison_analysis import analyse
from comparison_helpers import make_run
from comparison_html import write_html
from comparison_html_style import LINES_DARK, LINES_LIGHT, NAMES_DARK, NAMES_LIGHT
from comparison_ranking import rank
from comparison_runs import find_runs

SECTIONS = ["rules", "verdict", "table", "pairs", "curves", "costs", "order", "pareto", "effects", "scaling", "runs"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def report(folder, problems=(), **options):
    rankings = rank(find_runs(folder / "runs")[0])
    path = folder / "report.html"
    write_html(
        rankings,
        [analyse(each) for each in rankings],
        list(problems),
        path,
        "python compare_architectures.py",
        **options,
    )
    return path.read_text(encoding="utf-8")


def three_sizes(folder, seeds=(1, 2, 3)):
    """Two architectures at three sizes, three seeds each: everything has something to say."""
    for name, better in (("llama", 0.0), ("gpt2", 0.1)):
        for index, size in enumerate((1_000_000, 4_000_000, 16_000_000)):
            for seed in seeds:
                loss = 2.6 - 0.2 * index + better + 0.003 * seed + 0.001 * (index * seed % 2)
                make_run(
                    folder / "runs", f"{name}-{index}-s{seed}",
                    {"final_val_loss": loss, "flops_per_token": 6 * size, "total_flops": 6.0 * size * 76_800},
                    seed=seed,
                    n_layer=index + 2, normalization="rmsnorm" if name == "llama" else "layernorm", arch_preset=name,
                    parameters__total=size, flops__per_token_training=6 * size,
                )  # fmt: skip


class Checker(HTMLParser):
    """Tags that are opened and closed, ids, links, and what could load something."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.links, self.outside = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if tag == "a" else []
        self.outside += [tag] if tag in ("script", "link", "img", "iframe") or "src" in attrs else []

    def handle_startendtag(self, tag, attrs):
        if tag not in self.VOID:
            self.handle_starttag(tag, attrs)
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_all_sections_are_there_in_order_and_nothing_is_loaded(tmp_path):
    three_sizes(tmp_path)
    page = report(tmp_path)
    checker = Checker(page)
    assert checker.open == [] and checker.outside == []
    assert [each for each in checker.ids if each in SECTIONS] == SECTIONS
    assert len(checker.ids) == len(set(checker.ids))
    assert {link.lstrip("#") for link in checker.links} <= set(checker.ids)
    assert "http:" not in page and "https:" not in page and "default-src 'none'" in page
    assert page.index('id="rules"') < page.index('id="verdict"') < page.index('id="table"')


def test_the_verdict_is_in_plain_words(tmp_path):
    three_sizes(tmp_path)
    page = report(tmp_path)
    assert "llama-2 has the lowest final validation loss: " in page
    assert "It is separable from gpt2-2." in page
    assert re.search(
        r"llama-2 needs 0\.\d\dx the tokens, 0\.\d\dx the FLOPs and 0\.\d\dx the hours of gpt2-2 to reach 2\.7", page
    )
    assert "L(N) = " in page and "without E" in page
    assert "tau 1.00 between the two orders (2 architectures)" in page
    assert "No run recorded joules" in page


def test_one_seed_makes_no_claim(tmp_path):
    three_sizes(tmp_path, seeds=(1,))
    page = report(tmp_path)
    assert "With one seed each no claim can be made" in page
    assert "no claim: one seed" in page
    assert ">separable<" not in page


def test_void_claims_are_said_in_the_rules_and_in_the_row(tmp_path):
    make_run(tmp_path / "runs", "a")
    make_run(tmp_path / "runs", "b", {"final_val_loss": 1.9}, resolved__dtype="bfloat16", n_layer=3)
    page = report(tmp_path)
    assert "What differs and matters" in page and "loss and speed" in page
    assert "no claim: precision differs" in page
    assert "not comparable: precision differs" in page  # the Pareto fronts of hours and memory


def test_names_and_settings_cannot_break_the_page(tmp_path):
    make_run(tmp_path / "runs", "<b>&'a", command="<script>alert(1)</script>", normalization="<i>")
    make_run(tmp_path / "runs", "b", {"final_val_loss": 1.9})
    page = report(tmp_path, problems=["<u>bad</u>: left out"])
    assert Checker(page).open == [] and Checker(page).outside == []
    assert "<b>&" not in page and "<u>bad" not in page and "&lt;script&gt;" in page


def test_one_row_is_no_comparison(tmp_path):
    make_run(tmp_path / "runs", "a")
    page = report(tmp_path)
    assert "a stands alone, with nothing to compare it with: 2.0000 from one seed." in page
    assert 'id="pairs"' not in page


def test_no_finished_run_is_said_and_nothing_is_ranked(tmp_path):
    make_run(tmp_path / "runs", "a", {"status": "running"})
    make_run(tmp_path / "runs", "b", {"status": "interrupted"}, n_layer=3)
    page = report(tmp_path)
    sentence = "Nothing can be ranked: no run has finished with a finite final validation loss: "
    assert sentence + "a (unfinished), b (interrupted)" in page


def test_several_rankings_have_sections_of_their_own(tmp_path):
    make_run(tmp_path / "runs", "a")
    make_run(tmp_path / "runs", "b", dataset__fingerprint="other")
    page = report(tmp_path)
    ids = Checker(page).ids
    assert {"table-1", "table-2"} <= set(ids) and len(ids) == len(set(ids))
    assert "NOT COMPARABLE: 2 separate rankings" in page


def test_runs_without_metrics_still_have_a_table(tmp_path):
    make_run(tmp_path / "runs", "a", metrics=False)
    make_run(tmp_path / "runs", "b", {"final_val_loss": 1.9}, metrics=False, n_layer=3)
    page = report(tmp_path)
    assert "No run has evaluations in metrics.jsonl." in page and 'id="table"' in page


def luminance(color):
    channels = [int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """WCAG 2.1, 1.4.3."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_names_can_be_read_and_lines_be_seen_on_both_pages():
    assert min(contrast(color, "#ffffff") for color in NAMES_LIGHT) >= 4.5
    assert min(contrast(color, "#1a1e25") for color in NAMES_DARK) >= 4.5
    assert min(contrast(color, "#ffffff") for color in LINES_LIGHT) >= 2
    assert min(contrast(color, "#1a1e25") for color in LINES_DARK) >= 3


# -- a real browser


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    three_sizes(folder)
    make_run(
        folder / "runs", "a-run-with-" + "a-very-long-name-" * 5 + "s1", {"final_val_loss": 3.0}, seed=1, n_layer=9
    )
    report(folder)
    return folder / "report.html"


def browse(path, profile, *options):
    """(DOM after loading, console lines) from a headless Chromium."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={profile}", *options, "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    console = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if "CONSOLE" in line]
    return done.stdout.decode("utf-8"), console


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@needs_chromium
def test_a_browser_shows_every_section_and_complains_of_nothing(page_path, tmp_path):
    dom, console = browse(page_path, tmp_path, "--window-size=1280,900")
    assert console == []
    assert [each for each in Checker(dom).ids if each in SECTIONS] == SECTIONS
    assert dom.count("<svg") >= 8


@needs_chromium
@pytest.mark.parametrize(
    "scheme, background", [(1, "rgb(251, 251, 249)"), (0, "rgb(20, 23, 28)")], ids=["light", "dark"]
)
def test_a_phone_needs_no_sideways_scrolling_and_gets_its_scheme(page_path, tmp_path, scheme, background):
    """The page in a frame 390 pixels wide, with everything unfolded; the page around it measures."""
    page = page_path.read_text(encoding="utf-8").replace("<details", "<details open")
    host = tmp_path / "host.html"
    host.write_text(
        f'<iframe style="width:390px;height:844px;border:0" srcdoc="{html.escape(page)}"></iframe>'
        "<script>onload = () => {const {document: inner, innerWidth: width} = frames[0];"
        "document.title = [width, inner.documentElement.scrollWidth,"
        "frames[0].getComputedStyle(inner.body).backgroundColor].join('|')}</script>",
        encoding="utf-8",
    )
    dom, console = browse(
        host, tmp_path / "profile", "--hide-scrollbars", f"--blink-settings=preferredColorScheme={scheme}"
    )
    assert console == []
    assert re.search(r"<title>(.*?)</title>", dom)[1] == f"390|390|{background}"
