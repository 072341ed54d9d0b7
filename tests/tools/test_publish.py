"""Promise: what is published is what was run, and holds nothing of the machine that ran it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from cifar_ft import results
from cifar_ft.course import CourseError
from tools.publish import KERNELSPEC, RECORDED_FILES, publish, publish_run

STREAM = {"output_type": "stream", "name": "stdout"}


def ran(tmp_path: Path, *outputs, ran_source: str = "f()", **record) -> tuple[Path, Path]:
    """The folder of a run of one notebook, and the notebook as it is committed."""
    out, source = tmp_path / "out", tmp_path / "n"
    for folder, code, shown in ((source, "f()", []), (out, ran_source, outputs)):
        folder.mkdir()
        cells = [new_markdown_cell("# a"), new_code_cell("A: int = 1", metadata={"tags": ["parameters"]})]
        if folder == out:
            cells.append(new_code_cell("A = 1", metadata={"tags": ["injected-parameters"]}))
        cells.append(new_code_cell(code, outputs=list(shown), execution_count=7 if shown else None))
        for number, cell in enumerate(cells):
            cell.id = f"cell-{number}"
        metadata = {"kernelspec": {"name": "mine", "display_name": "Mine"}, "papermill": {"duration": 3}}
        nbformat.write(new_notebook(cells=cells, metadata=metadata), folder / "a.ipynb")
    record = {"complete": True, "seconds": {"a": 1.0}, "parameters": {"RECIPE": "quick"}, "changed": [], **record}
    (out / "course.json").write_text(json.dumps(record))
    return out, source


def test_outputs_come_back_and_nothing_else(tmp_path):
    picture = '<figure><img alt="x" src="data:image/png;base64,aa+/home/x/tmp/y="></figure>'
    out, source = ran(
        tmp_path,
        new_output("stream", name="stderr", text="a warning"),
        new_output("stream", text="\r 10%|#   | 1/9\r 99%|### | 8/9"),
        new_output("stream", text=f"\r        \rEpoch 1: done\nsaved to {tmp_path / 'out' / 'run'}\n"),
        new_output("execute_result", data={"text/html": picture, "text/plain": "x"}, execution_count=7),
    )
    before = nbformat.read(source / "a.ipynb", 4)
    assert publish(out, source) == ["a"]
    after = nbformat.read(source / "a.ipynb", 4)
    assert [(c.id, c.source, c.metadata) for c in after.cells] == [(c.id, c.source, c.metadata) for c in before.cells]
    assert [cell.execution_count for cell in after.cells[1:]] == [1, 2]
    assert after.metadata == {"kernelspec": KERNELSPEC}
    text, shown = after.cells[2].outputs  # no warning; of the progress bar what a reader saw last
    assert text.text == "Epoch 1: done\nsaved to course-output/quick/run\n"
    assert (shown.data["text/html"], shown.execution_count) == (picture, 2)
    once = (source / "a.ipynb").read_bytes()
    publish(out, source)
    assert (source / "a.ipynb").read_bytes() == once


@pytest.mark.parametrize(
    ("output", "changes", "message"),
    [
        (new_output("error", ename="ValueError", evalue="x", traceback=[]), {}, "error .ValueError"),
        (new_output("stream", text=f"saved\n{Path.home() / 'runs'}\n"), {}, "path of this machine"),
        (new_output("stream", text="see /home/ada/cifar/run"), {}, "/home/ada/cifar/run"),
        (new_output("display_data", data={"text/html": "<b>C:\\Users\\ada</b>"}), {}, "path of this machine"),
        (new_output("stream", text="1"), {"complete": False}, "no complete run"),
        (new_output("stream", text="1"), {"changed": ["EPOCHS"]}, "values that the notebooks do not show: EPOCHS"),
        (new_output("stream", text="1"), {"ran_source": "g()"}, "not the code that was run"),
    ],
)
def test_what_must_not_be_committed_is_refused_and_nothing_is_written(tmp_path, output, changes, message):
    out, source = ran(tmp_path, output, **changes)
    before = (source / "a.ipynb").read_bytes()
    with pytest.raises(CourseError, match=message):
        publish(out, source)
    assert (source / "a.ipynb").read_bytes() == before


def test_a_run_is_published_without_weights_and_paths(tmp_path):
    run = results.load_run(shutil.copytree(results.SHIPPED_RUN, tmp_path / "run"))
    (run.path / "steps.csv").write_text("step,epoch\n")  # those of before steps were kept have none
    mine = tmp_path / "mine"
    publish_run(run, mine)
    assert {path.name for path in mine.iterdir()} == set(RECORDED_FILES)
    assert (mine / "test_logits.npz").read_bytes() == (run.path / "test_logits.npz").read_bytes()
    (mine / "model.safetensors").write_bytes(b"large")
    config = json.loads((mine / "config.json").read_text())
    config["recipe"]["weights"] = "/home/somebody/secret/r50.pth"
    config["weights"]["source"] = "the file /home/somebody/secret/r50.pth"
    (mine / "config.json").write_text(json.dumps(config))
    publish_run(results.load_run(mine), tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors").exists()
    text = (tmp_path / "again" / "config.json").read_text()
    assert "the file r50.pth" in text
    assert "somebody" not in text
    assert results.load_run(tmp_path / "again").config["data"] == config["data"]
