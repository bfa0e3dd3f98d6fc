"""Plots and the HTML page."""

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megafp4.errors import UnsupportedError
from megafp4.report import Run, load_runs, table_rows, to_markdown, write_report
from megafp4.report.plots import (
    LOSS_WINDOW,
    gap_figure,
    gap_percent,
    loss_figure,
    rolling_mean,
    run_styles,
    statistics_figure,
    statistics_grid,
)
from tests.report.conftest import MakeRun, write_jsonl

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Collects the images, visible text and everything that would be loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if tag == "img" and key == "src":
                self.images.append(value or "")
            elif key in ("src", "href"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_of_a_comparison(make_run: MakeRun) -> None:
    make_run("bf16")
    folder = make_run("mxfp4", excess=0.01, stats=True).parent
    page = Page(write_report(folder).read_text())
    names = ["gap.png", "loss.png", "statistics-mxfp4.png"]
    assert sorted(path.name for path in (folder / "plots").iterdir()) == names
    pictures = {(folder / "plots" / name).read_bytes() for name in names}
    embedded = {
        base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in page.images
    }
    assert embedded == pictures
    assert all(picture.startswith(PNG) for picture in pictures)
    assert page.links == []
    for text in (
        "+1.00 %",
        "dgrad mxfp4 1,600",
        "model.hidden",
        "torch 2.13.0",
        "12,345 parameters",
    ):
        assert text in page.text
    rows = table_rows(load_runs(folder))
    assert json.loads((folder / "compare.json").read_text()) == rows
    assert (folder / "compare.md").read_text() == to_markdown(rows)


def test_report_of_one_run(make_run: MakeRun) -> None:
    folder = make_run("mxfp4", stats=True)
    page = Page(write_report(folder).read_text())
    assert len(page.images) == 2
    assert not (folder / "compare.json").exists()
    assert not (folder / "plots" / "gap.png").exists()


def test_report_of_a_run_that_has_only_begun(make_run: MakeRun) -> None:
    folder = make_run("mxfp4", steps=0, finished=False)
    page = Page(write_report(folder).read_text())
    assert page.images == []
    assert "(step 0 of 100)" in page.text


def test_a_report_can_be_written_again_and_is_the_same(make_run: MakeRun) -> None:
    folder = make_run("mxfp4", stats=True)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_everything_from_files_is_escaped(make_run: MakeRun) -> None:
    evil = "<script>alert(1)</script>"
    folder = make_run("mxfp4", data={"train": [evil]}, note='"><img src=x>', recipe=evil)
    page = Page(write_report(folder).read_text())
    assert "script" not in page.tags
    assert evil in page.text
    assert all(image.startswith("data:image/png;base64,") for image in page.images)


def test_the_ledger_is_shown_layer_by_layer_where_there_is_one(make_run: MakeRun) -> None:
    folder = make_run("mxfp4")
    rows = [{"layer": "blocks.0.mlp.up", "gemm": "dgrad", "a": "mxfp4", "b": "mxfp4", "count": 7}]
    (folder / "ledger.json").write_text(json.dumps(rows))
    assert "blocks.0.mlp.up" in Page(write_report(folder).read_text()).text


def test_missing_matplotlib_is_one_sentence(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run("mxfp4")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=re.escape("pip install 'megafp4[report]'")):
        write_report(folder)


def test_gap_uses_common_steps_only() -> None:
    rows = [{"step": s, "loss": 2.0 + s} for s in (1, 2, 4)]
    base = [{"step": s, "loss": 2.0} for s in (2, 3, 4)]
    assert gap_percent(rows, base) == ([2, 4], [100.0, 200.0])


def test_rolling_mean_is_centred_and_shorter_at_the_ends() -> None:
    assert rolling_mean([1, 2, 3, 4, 9], 3) == [1.5, 2, 3, 16 / 3, 6.5]
    assert rolling_mean([], 3) == []


def test_loss_lines_hold_the_data_in_the_recipes_colour(make_run: MakeRun) -> None:
    make_run("bf16")
    folder = make_run("mxfp4", excess=0.5).parent
    runs = load_runs(folder)
    styles = run_styles(runs)
    assert styles["bf16"][0] != styles["mxfp4"][0]
    for figure in (loss_figure(runs, styles), gap_figure(runs, styles)):
        lines = [line for line in figure.axes[0].lines if line.get_color() == styles["mxfp4"][0]]
        marked = next(line for line in lines if line.get_marker() == styles["mxfp4"][1])
        assert list(marked.get_xdata()) == [20, 40, 60, 80, 100]
    assert list(marked.get_ydata()) == pytest.approx([50.0] * 5)


def test_training_loss_is_a_running_mean_and_the_title_says_so(make_run: MakeRun) -> None:
    folder = make_run("mxfp4")
    rows = [{"kind": "train", "step": s, "loss": 2.0 + s % 2} for s in range(1, 101)]
    write_jsonl(folder / "metrics.jsonl", rows)
    runs = load_runs(folder)
    whole, late = loss_figure(runs, run_styles(runs)).axes
    assert f"mean of {LOSS_WINDOW} points" in whole.get_title()
    drawn = whole.lines[0].get_ydata()
    assert list(drawn) == pytest.approx(rolling_mean([row["loss"] for row in rows], LOSS_WINDOW))
    assert max(drawn[2:-2]) - min(drawn[2:-2]) == pytest.approx(1 / LOSS_WINDOW)
    assert len(late.lines[0].get_ydata()) == 51


def test_forty_runs_look_different(make_run: MakeRun) -> None:
    for index in range(40):
        folder = make_run(f"r{index}", steps=0)
    styles = run_styles(load_runs(folder.parent))
    assert len(set(styles.values())) == 40


def test_statistics_grid_takes_the_last_step_and_orders_operands(make_run: MakeRun) -> None:
    folder = make_run("mxfp4")
    keys = ("step", "layer", "gemm", "operand", "snr_db")
    rows = [
        dict(zip(keys, row, strict=True))
        for row in (
            (10, "old", "fprop", "a", 1.0),
            (20, "l1", "wgrad", "b", 2.0),
            (20, "l1", "fprop", "b", 3.0),
            (20, "l0", "fprop", "a", 4.0),
        )
    ]
    write_jsonl(folder / "stats.jsonl", rows)
    (run,) = load_runs(folder)
    step, layers, operands, cells = statistics_grid(run)
    assert (step, layers) == (20, ["l1", "l0"])
    assert operands == ["fprop x", "fprop W", "wgrad x"]
    assert cells["l0", "fprop x"]["snr_db"] == 4.0
    assert ("l0", "wgrad x") not in cells
    assert write_report(folder).exists()


def test_layers_stand_in_forward_order_when_only_gradients_are_quantized(
    make_run: MakeRun,
) -> None:
    folder = make_run("mxfp4")
    rows = [
        {"step": 1, "layer": layer, "gemm": gemm, "operand": "a", "snr_db": 1.0}
        for layer in ("l1", "l0")
        for gemm in ("dgrad", "wgrad")
    ]
    write_jsonl(folder / "stats.jsonl", rows)
    (run,) = load_runs(folder)
    assert statistics_grid(run)[1] == ["l0", "l1"]


def test_small_differences_do_not_fill_the_colour_scale(make_run: MakeRun) -> None:
    folder = make_run("mxfp4")
    rows = [
        {"step": 1, "layer": f"l{i}", "gemm": "fprop", "operand": "a", "snr_db": 15.4 + 0.1 * i,
         "underflow_rate": 0.001 * i}
        for i in range(5)
    ]  # fmt: skip
    write_jsonl(folder / "stats.jsonl", rows)
    (run,) = load_runs(folder)
    signal, underflow = statistics_figure(run).axes
    low, high = signal.images[0].get_clim()
    assert (low, high) == (pytest.approx(12.6), pytest.approx(18.6))
    assert underflow.images[0].get_clim() == (0.0, 30.0)


def span_run(folder: Path, fmt: str, spans: list[float]) -> Run:
    """A run with one layer per scale span, all other statistics zero or fixed."""
    rows = [
        {"step": 1, "layer": f"l{i}", "gemm": "fprop", "operand": "a", "format": fmt,
         "snr_db": 18.0, "clip_rate": 0.0, "underflow_rate": 0.0, "octave_span": span}
        for i, span in enumerate(spans)
    ]  # fmt: skip
    write_jsonl(folder / "stats.jsonl", rows)
    return load_runs(folder)[0]


def test_statistics_of_zeros_are_a_line_of_text(make_run: MakeRun) -> None:
    figure = statistics_figure(span_run(make_run("fp4"), "fp4-vector", [0.0, 0.0]))
    assert [axes.get_title() for axes in figure.axes] == ["Signal to noise (dB)"]
    assert figure.get_supxlabel() == (
        "Clipped (%): 0 everywhere. Underflow to zero (%): 0 everywhere. "
        "Scale span (octaves): 0 everywhere"
    )


def test_a_single_number_that_is_not_zero_keeps_its_panel(make_run: MakeRun) -> None:
    figure = statistics_figure(span_run(make_run("mxfp4"), "mxfp4", [0.0, 1.0]))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["Signal to noise (dB)", "Scale span (octaves)"]


def test_statistics_that_were_not_recorded_do_not_count_as_zero(make_run: MakeRun) -> None:
    folder = make_run("mxfp4")
    write_jsonl(
        folder / "stats.jsonl",
        [{"step": 1, "layer": "l0", "gemm": "dgrad", "operand": "a", "snr_db": 1.0,
          "clip_rate": None, "underflow_rate": 0.5, "octave_span": 0.0}],
    )  # fmt: skip
    (run,) = load_runs(folder)
    assert statistics_figure(run).get_supxlabel() == (
        "Clipped (%): not recorded. Scale span (octaves): 0 everywhere"
    )


@pytest.mark.parametrize(
    ("fmt", "spans", "framed"),
    [("mxfp4", [14.0, 15.0, 3.0, 29.0], [1, 3]), ("nvfp4", [15.0], [])],
)
def test_spans_beyond_exact_folding_are_framed(
    make_run: MakeRun, fmt: str, spans: list[float], framed: list[int]
) -> None:
    axes = statistics_figure(span_run(make_run("run"), fmt, spans)).axes[-1]
    assert [round(patch.get_y() + 0.5) for patch in axes.patches] == framed
    assert ("above 14" in axes.get_xlabel()) == (fmt == "mxfp4")


def test_a_deep_model_has_a_readable_heat_map(make_run: MakeRun) -> None:
    folder = make_run("mxfp4")
    rows = [
        {"step": 1, "layer": f"blocks.{i}", "gemm": "fprop", "operand": "a", "snr_db": float(i)}
        for i in range(200)
    ]
    write_jsonl(folder / "stats.jsonl", rows)
    write_report(folder)
    width, height = png_size(folder / "plots" / "statistics-mxfp4.png")
    assert height < 2.2 * width


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[16:24]
    return int.from_bytes(header[:4]), int.from_bytes(header[4:])
