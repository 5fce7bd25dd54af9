# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from nemo_dsv4_cp.checks import certificate
from nemo_dsv4_cp.checks.certificate import Certificate
from nemo_dsv4_cp.cli.plan import plan
from nemo_dsv4_cp.gpus import GPUS

app = typer.Typer()
app.command()(plan)


def run(*arguments, **env):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "80", **env})


def flat(text):
    return " ".join(text.replace("│", " ").split())


def tables(output):
    """The rows of each table, a list of cells each."""
    found, inside = [], False
    for line in output.splitlines():
        cells = line.replace(", ", ",").split()
        is_row = bool(cells) and (cells[0].isdigit() or (cells[0] == "step" and inside))
        if is_row and not inside:
            found.append([])
        inside = is_row
        if is_row:
            found[-1].append(cells)
    return found


def test_the_tables_have_a_row_for_each_size_and_fit_a_terminal():
    done = run("v4_flash", "--seq-len", "1048576", "--ranks", "64")
    assert done.exit_code == 0, done.output
    memory, time, layers = tables(done.output)
    for table in (memory, time):
        assert [row[0] for row in table] == ["1", "2", "4", "8", "16", "32", "64"]
    assert [len(row) for row in memory] == [10] * 7
    assert memory[-1][1] == "16,384"
    assert (memory[-1][6:8], memory[-1][-1]) == (["8.51", "160"], "yes")
    # Last / first and largest / mean without balance and with it, moved, ratios, step, tokens.
    assert time[-1][:7] == ["64", "2.88", "1.00", "1.48", "1.00", "7.18", "4,128"]
    assert time[-1][-1].endswith("*")
    assert not any(row[-1].endswith("*") for row in time[:-1])
    assert [row[0] for row in layers] == ["0", "4", "128", "step"]
    assert [row[1] for row in layers[:3]] == ["2", "21", "20"]
    assert "…" not in done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert "Smallest cp_size that fits: 64" in done.output
    assert "Fastest cp_size that fits: 64" in done.output
    assert "the last rank works" not in flat(done.output)


@pytest.mark.parametrize(
    "arguments",
    [
        ("v4_pro", "--seq-len", "1048576", "--ranks", "1024", "--gpu", "b200"),
        ("v4_flash", "--seq-len", "1048576", "--ranks", "64", "--transport", "all_gather"),
        ("v4_pro", "--seq-len", "65536", "--ranks", "64", "--balance", "off", "--no-overlap"),
        ("v4_flash", "--seq-len", "128", "--ranks", "1"),
    ],
)
def test_no_figure_is_cut_off(arguments):
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "…" not in done.output
    assert max(map(len, done.output.splitlines())) <= 80


def test_times_are_those_of_the_settings():
    arguments = ("v4_pro", "--seq-len", "1048576", "--ranks", "512", "--gpu", "b200")
    figures = json.loads(run(*arguments, "--json", "-").stdout)
    done = run(*arguments, "--balance", "off", "--no-overlap")
    _, time, layers = tables(done.output)
    for row, printed in zip(figures["rows"], time, strict=True):
        step = row["staying"]["step"]
        milliseconds = {
            str(each["ratio"]): [
                f"{each[name] * 1e3:,.1f}" for name in ("computing", "exposed", "communicating")
            ]
            for each in step["layers"]
        }
        seconds = step["computing"] + step["communicating"]
        tokens = 512 // row["cp_size"] * 1048576 / seconds
        assert float(printed[-3].replace(",", "")) == pytest.approx(seconds, rel=0.01)
        assert float(printed[-1].strip("*").replace(",", "")) == pytest.approx(tokens, abs=1)
        if printed[-1].endswith("*"):
            assert {row[0]: row[2:5] for row in layers[:-1]} == milliseconds
    assert any(row[-1].endswith("*") for row in time)
    assert "balance: auto shares the work out" in flat(done.output)


def test_an_own_size_that_auto_leaves_alone_is_shown_so():
    done = run("v4_flash", "--seq-len", "8192", "--cp-size", "8")
    _, (row,), layers = tables(done.output)
    assert row[1:3] == [row[1]] * 2
    assert row[5:7] == ["0.00", "-"]
    assert all(each[2:5] == each[5:8] for each in layers[:-1])
    moved = tables(run("v4_flash", "--seq-len", "8192", "--cp-size", "8", "--balance", "on").output)
    assert moved[1][0][6] == "4,128"


def test_a_gpu_brings_memory_and_rates_that_options_override():
    def planned(*options):
        command = ("v4_flash", "--seq-len", "131072", "--cp-size", "8", "--json", "-", *options)
        figures = json.loads(run(*command).stdout)
        return figures["request"]["gpu"], figures["rows"][0]

    h100, slow = planned()
    b200, fast = planned("--gpu", "b200")
    assert (h100["name"], h100["memory"], h100["nvlink_gbs"]) == ("h100", 80, 450)
    assert (b200["name"], b200["memory"], b200["nvlink_gbs"]) == ("b200", 179, 900)
    assert fast["step_seconds"] < slow["step_seconds"]
    own = ("--gpu-memory", "70", "--tflops", "500", "--nvlink-gbs", "300", "--network-gbs", "25")
    mine, _ = planned("--gpu", "b200", *own)
    changed = {"memory": 70, "tflops": 500, "nvlink_gbs": 300, "network_gbs": 25}
    assert mine == b200 | changed


def test_the_document_shows_what_is_printed():
    text = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    shown = text.split("$ nemo-dsv4-cp plan ", 1)[1].split("```", 1)[0]
    command, *lines = shown.splitlines()
    done = run(*command.split())
    assert [line.rstrip() for line in done.output.splitlines()] == lines


def test_json_holds_the_plan_and_nothing_else():
    done = run("v4_pro", "--seq-len", "16384", "--cp-size", "8", "--json", "-")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    (row,) = figures["rows"]
    assert row["cp_size"] == 8
    assert [cost["path"] for cost in row["costs"]] == ["boundary", "all_gather", "automodel"]
    assert [row[name]["balance"] for name in ("staying", "moving")] == ["off", "auto"]
    assert row["moving"]["moved_bytes"] == row["staying"]["moved_bytes"] == 0
    assert figures["smallest_cp_size_that_fits"] == 2
    assert any("is larger than the memory needs" in line for line in figures["warnings"])


def test_nothing_that_fits_is_said(tmp_path):
    done = run("v4_flash", "--seq-len", "1048576", "--json", str(tmp_path / "plan.json"))
    assert done.exit_code == 0, done.output
    assert "No cp_size up to --ranks fits" in flat(done.output)
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["smallest_cp_size_that_fits"] is figures["fastest_cp_size_that_fits"] is None


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
        (["--cp-size", "16"], "--cp-size 16 needs as many GPUs, --ranks is 8"),
        (["--gpu-memory", "0"], "--gpu-memory 0 is no GPU's; use such as 80"),
        (["--reserved", "80"], "from 0 to below 80, such as 40"),
        (["--gpu", "v100"], "--gpu v100 is unknown; use a100, h100, h200, b200"),
        (["--balance", "sometimes"], "use auto, on or off"),
        (["--compressor-precision", "tf32"], "use float32 or bf16x3"),
        (["--tflops", "-1"], "--tflops -1 is no GPU's; use such as 989"),
        (["--nvlink-gbs", "0"], "--nvlink-gbs 0 is no GPU's; use such as 450"),
        (["--network-gbs", "inf"], "--network-gbs inf is no GPU's; use such as 50"),
        (["--json", "nowhere/plan.json"], "nowhere/plan.json: there is no directory nowhere"),
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
        (None, "cannot be read; use v4_flash, v4_pro, v41_flash"),
        ("model: [", "neither JSON nor YAML"),
        ("hidden_size: 64", "names no compress_ratios"),
        ("compress_ratios: [0]", "model.yaml: compress_ratios holds 1 ratios for"),
        ("compress_ratios: [0]\nhead_dim: null", "model.yaml: the model's fields lack head_dim"),
    ],
)
def test_a_file_that_is_no_model_is_refused(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "model.yaml").write_text(text)
    done = run("model.yaml", "--seq-len", "16384")
    assert done.exit_code == 2
    assert message in flat(done.output)


def test_v41_is_planned_by_its_kinds_of_layers():
    done = run("v41_flash", "--seq-len", "1048576", "--ranks", "64")
    assert done.exit_code == 0, done.output
    memory, time, _ = tables(done.output)
    assert [len(row) for row in memory] == [10] * 7
    assert (memory[-1][6:8], memory[-1][-1]) == (["12.5", "119"], "yes")
    assert time[-1][:7] == ["64", "1.20", "1.00", "1.09", "1.00", "0.19", "1,2"]
    assert time[-1][7:9] == ["4.58", "4.15"]
    for kind, layers in (("1 source", 1), ("1 inside", 4), ("2 source", 3), ("2 reuse", 15)):
        assert f" {kind} {layers} " in " ".join(done.output.split())
    assert "select the entries for half of each rank's queries in layers 2, 8, 14, 20;" in flat(
        done.output
    )
    assert "its scores are dense" in flat(done.output)
    assert "…" not in done.output
    assert max(map(len, done.output.splitlines())) <= 80


def test_balance_that_moves_nothing_of_v41_says_so():
    done = run("v41_flash", "--seq-len", "8192", "--ranks", "8", "--cp-size", "8")
    assert "balance auto moves nothing; attention stays" in flat(done.output)


@pytest.mark.parametrize("level", ["text_config", "config", "model.config"])
def test_a_config_of_v41_is_planned_as_the_packaged_sizes(level, tmp_path):
    source = files("nemo_dsv4_cp.configs") / "model" / "v41_flash.yaml"
    tree = yaml.safe_load(source.read_text("utf-8"))
    tree = {"model.config": {"model": tree}, "config": tree, "text_config": tree["config"]}[level]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    options = ("--seq-len", "65536", "--cp-size", "8", "--json", "-")
    packaged, read = (json.loads(run(model, *options).stdout) for model in ("v41_flash", str(path)))
    assert read == packaged
    assert read["request"]["sizes"]["kv_source_layer_ids"] == [2, 8, 14, 20]


def test_automodels_defaults_stand_for_what_a_recipe_leaves_out():
    recipe = files("nemo_dsv4_cp.configs") / "model" / "tiny.yaml"
    done = run(str(recipe), "--seq-len", "2048", "--ranks", "2", "--json", "-")
    assert done.exit_code == 0, done.output
    sizes = json.loads(done.stdout)["request"]["sizes"]
    assert (sizes["hidden_size"], sizes["n_shared_experts"]) == (128, 1)


def test_a_plot_without_matplotlib_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr("nemo_dsv4_cp.cli.output.find_spec", lambda name: None)
    done = run("v4_flash", "--seq-len", "16384", "--plot", str(tmp_path / "out.png"))
    assert done.exit_code == 2
    assert "--plot needs matplotlib" in flat(done.output)


def test_help_shows_an_example():
    help_text = flat(run("--help").output)
    assert "Example: nemo-dsv4-cp plan v4_flash --seq-len 1048576 --ranks 64" in help_text


def test_planning_never_imports_automodel():
    script = "import sys, nemo_dsv4_cp.cli.plan; sys.exit('nemo_automodel' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_certificate_of_this_machines_gpu_gives_the_rate_of_kernels(monkeypatch):
    measured = Certificate("triton", 0.5, 12.0, 321.0, None, "report.json")
    monkeypatch.setattr("nemo_dsv4_cp.cli.plan.known_gpu", lambda: GPUS["h200"])
    monkeypatch.setattr(certificate, "on_disk", lambda sizes: [measured])
    arguments = ("v4_flash", "--seq-len", "131072", "--ranks", "8", "--cp-size", "8")
    assumed, here = (flat(run(*arguments, "--gpu", gpu).output) for gpu in ("h100", "h200"))
    assert "321 of attention and index scores" in here
    assert "was measured here, of triton" in here
    assert "measured" not in assumed


def test_compressors_take_a_third_of_the_rate_of_products_with_bf16x3():
    arguments = "v4_flash", "--seq-len", "131072", "--cp-size", "8", "--json", "-"
    plans = [
        json.loads(run(*arguments, "--compressor-precision", precision).output)
        for precision in ("float32", "bf16x3")
    ]
    gpu = plans[1]["request"]["gpu"]
    assert gpu["float32_tflops"] == pytest.approx(gpu["tflops"] / 3)
    before, after = (
        {each["ratio"]: each["computing"] for each in made["rows"][0]["moving"]["step"]["layers"]}
        for made in plans
    )
    assert before[0] == after[0]
    # Features of entries and of index keys; the indexer's have no backward and no recomputation.
    flop = 2 * 16384 * 4096 * (4 * 512 * 4 + 4 * 128)
    saved = flop * (1 / GPUS["h100"].float32_per_second - 3 / GPUS["h100"].products_per_second)
    assert before[4] - after[4] == pytest.approx(saved)
