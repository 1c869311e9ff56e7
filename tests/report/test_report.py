"""The report: what it shows is what the files say, and a real browser shows it, wide and narrow, without asking the network."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from dde_ds.cli import main
from dde_ds.config import load_config
from dde_ds.errors import UserError
from dde_ds.report.comparison import choose
from dde_ds.report.svg import Line, heatmap, line_chart
from dde_ds.report.write import report
from tests.support.launching import PATIENCE, write_config
from tests.support.pipelines import save_sd
from tests.support.scorers import save_clip

BUCKETS = 7


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, sd_model, sd_shards) -> Path:
    """A run's files with every kind of row; the numbers are made up, the formats are those of the trainer."""
    folder = tmp_path_factory.mktemp("run") / "first-run"
    folder.mkdir()
    config = write_config(folder.parent / "run.yaml", sd_model, sd_shards, samples={"prompts": ["a <b>fox</b> & more"]})
    (folder / "config.yaml").write_text(load_config(config).to_yaml())
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "correction.jsonl").open("w") as correction:
        for step in range(1, 41):
            row = {
                "step": step,
                "position": 8 * step,
                "loss": 0.7 / step,
                "rewards/chosen": 0.1 * step,
                "rewards/rejected": -0.2 * step,
            }
            row |= {
                "drift/chosen": 1e-4 * step,
                "drift/rejected": 2e-4 * step,
                "perf/pairs_per_s": 30.0,
                "something/new": step**0.5,
            }
            row |= {f"accuracy_by_t/{100 * i:03d}-{100 * i + 99}": 0.5 + 0.01 * i for i in range(BUCKETS) if (step + i) % 3}
            row |= {f"drift_by_t/{100 * i:03d}-{100 * i + 99}": 0.01 * i for i in range(BUCKETS)}
            row |= {"eval/accuracy": 0.6} if step % 10 == 0 else {}
            row["grad_norm"] = float("nan") if step == 20 else 1.0
            metrics.write(json.dumps(row) + "\n")
            correction.write(
                json.dumps({"step": step, "timesteps": [0, 500, 999], "correction": [-1e-3 * step, -5e-4, 0.0]}) + "\n"
            )
        metrics.write('{"step": 41, "lo')  # cut short by a kill
    (folder / "samples").mkdir()
    for step in range(0, 40, 5):
        Image.new("RGB", (2000, 500), (step, 90, 90)).save(folder / "samples" / f"step-{step:08d}.png")
    return folder


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, sd_model) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    prompts = [*(f"prompt number {n}" for n in range(9)), "an <img src=x onerror=alert(1)> " + "unbroken" * 30]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    models = [f"base={sd_model}", f"a-model-with-a-rather-long-name={save_sd(folder / 'aligned', 'v_prediction')}"]
    drawing = ["--prompts", str(folder / "prompts.txt"), "--images-per-prompt", "2", "--steps", "2"]
    scorer = f"clip={save_clip(folder / 'clip')}"
    command = ["evaluate", "--base", models[0], "--model", models[1], *drawing, "--scorers", scorer, "--out", str(folder / "out")]
    assert main(command) == 0
    return folder / "out"


class Page(HTMLParser):
    """Start tags with their attributes, and the text."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.text += data + "\n"


def assert_loads_nothing(path: Path) -> None:
    page = Page(path)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "srcset", "xlink:href", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text


def test_a_run_alone(run_folder, tmp_path, capsys):
    output = tmp_path / "report.html"
    assert main(["report", str(run_folder), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert_loads_nothing(output)
    page = Page(output)
    for shown in ("40 of 4, 320 pairs", "not done", "something/new", "eval/accuracy", "Drift of the errors", "rewards/rejected"):
        assert shown in page.text, shown
    for shown in (
        "Accuracy by timestep",
        "Winners' drift by timestep",
        "Credit of a timestep",
        "step 40",
        "step 9",
        "a <b>fox</b> & more",
        "learning_rate: 0.0002",
    ):
        assert shown in page.text, shown
    assert "Margin by timestep" not in page.text, "no row has any"
    assert "drift_by_t/" not in page.text, "a map of all, no chart of each"
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4
    for image in images:
        assert Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).size == (1200, 300)
    assert output.stat().st_size < 200_000


def test_by_default_it_lies_in_the_run_folder_and_needs_no_more_than_rows(run_folder, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(run_folder / "metrics.jsonl", folder)
    assert main(["report", str(folder)]) == 0
    assert "Loss" in Page(folder / "report.html").text
    assert_loads_nothing(folder / "report.html")
    (folder / "metrics.jsonl").write_text("")
    assert main(["report", str(folder)]) == 0
    assert "no row in metrics.jsonl yet" in Page(folder / "report.html").text
    shutil.copy(run_folder / "config.yaml", folder)
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + "\nnew_key: 3\n")
    assert main(["report", str(folder)]) == 0
    assert "Not readable by this version: unknown key new_key" in Page(folder / "report.html").text


def test_a_comparison_alone(comparison, tmp_path):
    output = tmp_path / "report.html"
    assert main(["report", str(comparison / "comparison.json"), "--output", str(output), "--pictures", "3"]) == 0
    assert_loads_nothing(output)
    page = Page(output)
    data = json.loads((comparison / "comparison.json").read_text())
    row = data["results"][0]["difference"]
    assert f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 3 * 3 * 2
    gain = torch.tensor(data["scores"]["a-model-with-a-rather-long-name"]["clip"]) - torch.tensor(data["scores"]["base"]["clip"])
    # The first picture is the image of the largest gain, and says so.
    prompt, image = divmod(int(gain.argmax()), 2)
    first = page.text.index("Largest gains by clip")
    assert page.text.index(f"{data['prompts'][prompt]} (image {image})") < page.text.index("Largest losses by clip")
    assert f"clip {data['scores']['base']['clip'][prompt][image]:.3f}" in page.text[first:]
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    shown = Image.open(io.BytesIO(base64.b64decode(sources[0].partition(",")[2])))
    stored = Image.open(comparison / "images" / "base" / "images" / f"{prompt:05d}-{image:02d}.png")
    assert list(shown.getdata()) == list(stored.getdata())


def test_images_that_are_gone_are_named(comparison, tmp_path):
    copy = tmp_path / "moved.json"
    (tmp_path / "comparison").mkdir()
    shutil.copy(comparison / "comparison.json", tmp_path / "comparison" / "comparison.json")
    assert main(["report", str(tmp_path / "comparison"), "--output", str(copy)]) == 0
    assert Page(copy).text.count("is not there.") == 36


def test_both_ends_and_the_rest_at_random():
    gain = torch.zeros(100, 4)
    gain[17, 2], gain[5, 1], gain[60, 3], gain[61, 0] = 3.0, 2.0, -4.0, -1.0
    best, worst, drawn = choose(gain, 2)
    assert (best, worst) == ([(17, 2), (5, 1)], [(60, 3), (61, 0)])
    assert drawn == choose(gain, 2)[2] == choose(-gain, 2)[2], "the random ones do not look at the scores"
    assert {prompt for prompt, _ in choose(gain, 500)[2]} == set(range(100))


def test_lines_keep_their_peaks_and_gaps():
    y = [1.0] * 10_000
    y[5_000] = 9.0
    y[7_000] = float("nan")
    chart = line_chart("x", [Line("a", range(10_000), y)], "step")
    lines = [[tuple(map(float, point.split(","))) for point in points.split()] for points in re.findall(r'points="([^"]*)"', chart)]
    assert len(lines) == 2
    assert all(len(points) <= 402 for points in lines)
    # The peak is the highest point of the picture, half-way along.
    x, _ = min((point for points in lines for point in points), key=lambda point: point[1])
    left, right = lines[0][0][0], lines[1][-1][0]
    assert (x - left) / (right - left) == pytest.approx(0.5, abs=0.002)
    assert line_chart("x", [Line("a", [1], [float("nan")])], "step") == ""
    assert "<circle" in line_chart("x", [Line("a", [1], [3.0])], "step")


@pytest.mark.parametrize("rows", [1, 10, 50])
def test_heatmap_of_any_number_of_rows(rows):
    chart = heatmap("x", [(f"{i}", [0.5 + 0.4 * (i % 2)] * 200) for i in range(rows)], range(200), 0.5, "step")
    assert chart.count("<rect") == 60 * rows
    height = float(re.search(r'viewBox="0 0 420 ([\d.]+)"', chart).group(1))
    assert max(float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)"', chart)) < height


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "no such file or folder"), ({}, "neither a run folder"), ({"comparison.json": "{}"}, "is no comparison")],
)
def test_what_is_no_source(tmp_path, capsys, content, named):
    folder = tmp_path / "x"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    assert main(["report", str(folder)]) == 1
    assert named in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_damaged_rows_are_left_out(run_folder, tmp_path, capsys):
    """The page is that of the whole rows, and one line says how many are missing."""
    whole = shutil.copytree(run_folder, tmp_path / "run")
    pages = []
    for junk in (b"", b'\0\0\0\n{"loss": 1}\n{"step": 1, "timesteps": 3, "loss": "a"}\n'):
        for name in ("metrics.jsonl", "correction.jsonl"):
            (whole / name).write_bytes(junk + (whole / name).read_bytes())
        assert main(["report", str(whole)]) == 0
        pages.append((whole / "report.html").read_text())
    assert pages[0] == pages[1]
    lines = sorted(capsys.readouterr().err.splitlines())
    assert lines == [f"warning: {whole}/{name}.jsonl: 3 damaged lines are left out" for name in ("correction", "metrics")]


ODD = (
    None,
    True,
    -1,
    0,
    1.5,
    10**400,
    1e308,
    -1e308,
    5e-324,
    math.nan,
    math.inf,
    "",
    "x\0",
    "\x1b[31m",
    [],
    [[]],
    {},
    {"x": []},
    [None] * 3,
)


def places(value, path=()):
    """Paths to everything in JSON; of a list its first member."""
    yield path
    keys = value.keys() if isinstance(value, dict) else range(min(1, len(value))) if isinstance(value, list) else ()
    for key in keys:
        yield from places(value[key], (*path, key))


def changed(value, path, change):
    """A copy with ``change`` made to what lies at ``path``."""
    if not path:
        return change(value)
    copied = value.copy()
    copied[path[0]] = changed(value[path[0]], path[1:], change)
    return copied


def outcome(source: Path, output: Path) -> int:
    """1 for a report that ended in one line, otherwise 0. Any traceback is raised here."""
    try:
        report([source], output, pictures=1)
    except UserError as error:
        assert "\n" not in str(error)
        return 1
    return 0


def test_any_change_of_a_comparison_ends_in_a_page_or_one_line(comparison, tmp_path, monkeypatch):
    whole = json.loads((comparison / "comparison.json").read_text())
    source, page = comparison / "changed" / "comparison.json", tmp_path / "page.html"
    source.parent.mkdir()
    codes = []
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a thousand pages that nobody keeps
    try:
        for path in places(whole):
            for odd in ODD:
                source.write_text(json.dumps(changed(whole, path, lambda _, odd=odd: odd)))
                codes.append(outcome(source, page))
            if path:
                # A key or a member that is missing.
                key, lost = path[-1], changed(whole, path[:-1], lambda held: held.copy())
                held = lost
                for step in path[:-1]:
                    held = held[step]
                del held[key]
                source.write_text(json.dumps(lost))
                codes.append(outcome(source, page))
        text = (comparison / "comparison.json").read_bytes()
        for damaged in (
            b"",
            text[: len(text) // 2],
            b"[" * 100_000,
            text.replace(b"prompt number 1", b"\\ud83c"),
            text.replace(b"e", b"\xff"),
        ):
            source.write_bytes(damaged)
            assert outcome(source, page) == 1
    finally:
        shutil.rmtree(source.parent)
    assert len(codes) > 1000
    assert codes.count(1) > 500, "what a page needs was not missed"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("results", 0, "beats", "rate"), "0.5", "damaged: results[0].beats.rate is '0.5', expected a finite number"),
        (("scores", "base", "clip", 3), [0.1], "damaged: scores by clip of base are not 2 of each of 10 prompts"),
        (("base",), "other", "damaged: base is 'other', which is none of folders"),
        (("prompts",), [], "damaged: it has no prompts, or no images of them"),
        (("settings", "base"), None, "damaged: settings['base'] is null, expected an object"),
        (("results", 0, "model"), "gone", "damaged: results or sets name the model 'gone', which is none of folders"),
    ],
)
def test_what_is_wrong_with_a_comparison_is_named(comparison, tmp_path, capsys, path, value, said):
    whole = json.loads((comparison / "comparison.json").read_text())
    source = tmp_path / "comparison.json"
    source.write_text(json.dumps(changed(whole, path, lambda _: value)))
    assert main(["report", str(source)]) == 1
    assert capsys.readouterr().err == f"error: {source}: {said}; compare again\n"


def test_odd_run_folders(run_folder, tmp_path):
    """Numbers that cannot be drawn, pictures that are none, a pipe, a noise schedule that is damaged, a name that is no text."""
    folder = tmp_path / os.fsdecode(b"run-\xff")
    shutil.copytree(run_folder, folder)
    rows = [{"step": step, "position": 8, "loss": loss} for step, loss in enumerate((1e308, -1e308, math.inf, 5e-324, 0.7), 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = sorted((folder / "samples").glob("*.png"))
    samples[0].write_bytes(samples[0].read_bytes()[:100])
    samples[3].unlink()
    os.mkfifo(samples[3])
    (folder / "samples" / "step-².png").write_bytes(b"")
    (folder / "export" / "scheduler").mkdir(parents=True)
    (folder / "export" / "scheduler" / "scheduler_config.json").write_text('{"num_train_timesteps": ')
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    text = Page(tmp_path / "page.html").text
    assert "No credit profile: model.path" in text
    assert text.count("is no readable image.") == 3
    assert "run-\\udcff" in text


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Frames of the page at both widths, and two pages that must be found out. Chromium opens no window as narrow as a phone.
FRAMES = """<!DOCTYPE html><body><pre id="found"></pre><script>
const pages = PAGES;
const found = {};
for (const [name, [width, html]] of Object.entries(pages)) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 800;
  frame.onload = () => setTimeout(() => {
    const root = frame.contentDocument.documentElement;
    found[name] = {
      width: root.clientWidth, needed: root.scrollWidth,
      loaded: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
      images: [...frame.contentDocument.images].filter(image => !(image.complete && image.naturalWidth)).length,
      height: root.scrollHeight,
    };
    document.getElementById("found").textContent = JSON.stringify(found);
  }, 1000);
  frame.srcdoc = html;
  document.body.append(frame);
}
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_in_a_browser(run_folder, comparison, tmp_path):
    output = tmp_path / "report.html"
    assert main(["report", str(run_folder), str(comparison), "--output", str(output)]) == 0
    html = output.read_text(encoding="utf-8")
    address = "http://127.0.0.1:9/picture.png"
    pages = {
        "phone": (375, html),
        "desktop": (1280, html),
        "too wide": (375, html.replace("<main>", '<main><div style="width:900px">wide</div>')),
        "asks": (375, f'<!DOCTYPE html><img src="{address}">'),
    }
    frames = tmp_path / "frames.html"
    frames.write_text(FRAMES.replace("PAGES", json.dumps(pages).replace("</", "<\\/")), encoding="utf-8")
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    command = [CHROMIUM, "--headless", *root, "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}"]
    process = subprocess.run(
        [*command, "--window-size=1400,900", "--virtual-time-budget=20000", "--dump-dom", frames.as_uri()],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', process.stdout, re.DOTALL).group(1))
    assert set(found) == set(pages), process.stderr[-2000:]
    assert found["asks"]["loaded"] == [address], "the browser does not tell of requests, so this test would see none"
    assert found["too wide"]["needed"] > found["too wide"]["width"], "the browser does not tell of overflow"
    for name, least in (("phone", 350), ("desktop", 1250)):
        page = found[name]
        assert page["needed"] <= page["width"], (name, page)
        assert page["width"] >= least
        assert page["loaded"] == []
        assert page["images"] == 0, "some image did not load"
        assert page["height"] > 2000
