import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from nemo_dsv4_cp.cli.plan import plan

app = typer.Typer()
app.command()(plan)


def run(*arguments, **env):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "80", **env})


def flat(text):
    return " ".join(text.replace("│", " ").split())


def test_the_table_has_a_row_for_each_size_and_names_the_smallest_that_fits():
    done = run("v4_flash", "--seq-len", "1048576", "--ranks", "64")
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "4", "8", "16", "32", "64"]
    assert [len(row) for row in rows] == [11] * 7
    assert rows[-1][1] == "16,384"
    assert (rows[-1][6:8], rows[-1][-1]) == (["6.30", "160"], "yes")
    assert "…" not in done.output
    assert "Smallest cp_size that fits: 64" in done.output
    assert "Warning: cp_size 2, 4, 8, 16, 32, 64: the last rank works" in flat(done.output)


def test_json_holds_the_plan_and_nothing_else():
    done = run("v4_pro", "--seq-len", "16384", "--cp-size", "4", "--json", "-")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert [row["cp_size"] for row in figures["rows"]] == [4]
    paths = [cost["path"] for cost in figures["rows"][0]["costs"]]
    assert paths == ["boundary", "all_gather", "host"]
    assert any("is larger than the memory needs" in line for line in figures["warnings"])


def test_nothing_that_fits_is_said(tmp_path):
    done = run("v4_flash", "--seq-len", "1048576", "--json", str(tmp_path / "plan.json"))
    assert done.exit_code == 0, done.output
    assert "No cp_size up to --ranks fits" in flat(done.output)
    assert json.loads((tmp_path / "plan.json").read_text())["smallest_cp_size_that_fits"] is None


@pytest.mark.parametrize("ranks", ["1", "8"])
@pytest.mark.filterwarnings("error")
def test_the_plot_is_drawn(ranks, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "out.png"
    done = run("v4_flash", "--seq-len", "131072", "--ranks", ranks, "--plot", str(plot))
    assert done.exit_code == 0, done.output
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--transport", "carrier_pigeon"], "use boundary or all_gather"),
        (["--cp-size", "16"], "--cp-size 16 needs as many GPUs, --ranks says 8"),
        (["--gpu-memory", "0"], "use GiB, such as 80"),
        (["--reserved", "80"], "from 0 to below 80, such as 40"),
        (["--json", "no-such-directory/plan.json"], "--json no-such-directory/plan.json cannot"),
        (["--plot", "."], "--plot . cannot be written"),
        (["--plot", "out.txt"], "end it with .png"),
        (["--seq-len", "0"], "--seq-len"),
    ],
)
def test_a_mistake_ends_with_a_line_that_says_what_works(arguments, message):
    done = run("v4_flash", "--seq-len", "16384", *arguments)
    assert done.exit_code == 2
    assert message in flat(done.output)
    assert "Traceback" not in done.output


def test_a_model_of_the_hub_is_planned_with_packaged_sizes_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model:\n  config:\n    pretrained_model_name_or_path: deepseek-ai/DeepSeek-V4-Pro\n"
    )
    options = ["--seq-len", "16384", "--json", "-"]
    packaged = json.loads(run("v4_pro", *options).stdout)
    for model in ("deepseek-ai/DeepSeek-V4-Pro", str(recipe)):
        done = run(model, *options)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout) == packaged
        assert "the package's sizes of v4_pro stand in" in flat(done.stderr)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read; use v4_flash or v4_pro"),
        ("model: [", "neither JSON nor YAML"),
        ("hidden_size: 64", "names no compress_ratios"),
        ("compress_ratios: [0]", "lack hidden_size"),
    ],
)
def test_a_file_that_is_no_model_is_refused(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "model.yaml").write_text(text)
    done = run("model.yaml", "--seq-len", "16384")
    assert done.exit_code == 2
    assert message in flat(done.output)


def test_a_plot_without_matplotlib_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr("nemo_dsv4_cp.cli.plan.find_spec", lambda name: None)
    done = run("v4_flash", "--seq-len", "16384", "--plot", str(tmp_path / "out.png"))
    assert done.exit_code == 2
    assert "--plot needs matplotlib" in flat(done.output)


def test_help_shows_an_example():
    help_text = flat(run("--help").output)
    assert "Example: nemo-dsv4-cp plan v4_flash --seq-len 1048576 --ranks 64" in help_text


def test_planning_never_imports_the_host():
    script = "import sys, nemo_dsv4_cp.cli.plan; sys.exit('nemo_automodel' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
