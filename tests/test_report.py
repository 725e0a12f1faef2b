"""eval.py --report: what it plans, resumes, skips and writes."""

import argparse
import json
import shutil

import pytest

import data
import eval as scoring


@pytest.fixture
def report(monkeypatch, call, tmp_path):
    """report(*flags) -> (exit status, stdout, stderr), into tmp_path/report; training is cut to a few steps."""
    steps = {"vector": "60", "lora": "60"}
    plan = scoring.plan_jobs

    def short_plan(*args):
        jobs = plan(*args)
        for job in jobs:
            job.flags[-2:-2] = ["--steps", steps[job.flags[1]]]
        return jobs
    monkeypatch.setattr(scoring, "plan_jobs", short_plan)

    def run(*flags):
        return call(scoring.main, "eval.py", "--report", "--out", tmp_path / "report", *flags)
    run.steps = steps
    return run


def plan(tasks, layers=None, seeds=1, model="tiny", model_layers=4):
    args = argparse.Namespace(tasks=tasks, layers=layers, seeds=seeds, model=model, device="cpu", sweep=None)
    return scoring.plan_jobs(args, model_layers)


def test_every_task_has_its_controls_and_comparisons():
    for task in data.TASKS:
        methods = {job.method for job in plan([task])}
        assert {"vector", "lora", "lora, all layers", "shuffled vector"} <= methods
        assert ("vector at the trigger" in methods) == (task == "backdoor")
    layers = {job.layer for job in plan(["risk"]) if job.method == "vector"}
    assert layers == {-1, 0, 1, 2, 3}


def test_no_two_runs_share_a_folder():
    names = [job.name for job in plan(data.TASKS, seeds=5)]
    assert len(set(names)) == len(names)


def test_a_deep_models_layers_are_sampled_and_the_papers_is_among_them():
    jobs = plan(["risk"], model="folder", model_layers=48)
    layers = {job.layer for job in jobs if job.method == "vector"}
    assert len(layers) <= 12 and {-1, 47, 48 * 2 // 5} <= layers
    main = {job.layer for job in jobs if job.is_main and job.method == "vector"}
    assert main == {48 * 2 // 5}


def test_the_report_measures_writes_and_resumes(report, tmp_path):
    status, out, err = report("--tasks", "functions", "--seeds", 1, "--layers", "0")
    assert status == 0, err
    content = json.loads((tmp_path / "report" / "results.json").read_text())
    found = content["tasks"]["functions"]
    summary = found["methods"]["vector"]["summary"]["held_out"]
    assert summary["trained"][0] > summary["base"][0] + 0.3
    assert 0 <= found["lora_adds"]["share"][0] <= 1
    assert set(found["added"]) == {"principal component", "mean unit difference", "random", "difference of means"}
    text = (tmp_path / "report" / "report.md").read_text()
    for heading in ("C1, C4", "C2", "C3, C5", "C6", "C8", "shuffled vector"):
        assert heading in text
    for figure in ("means.png", "lora_differences.png", "scales.png"):
        assert (tmp_path / "report" / figure).stat().st_size > 10_000

    run = tmp_path / "report" / "runs" / "functions-lora-layer0-seed0"
    before = (run / "results.json").stat().st_mtime_ns
    (tmp_path / "report" / "runs" / "functions-vector-layer0-seed0" / "results.json").write_text("{ not json")
    status, out, err = report("--tasks", "functions", "--seeds", 1, "--layers", "0")
    assert status == 0
    assert (run / "results.json").stat().st_mtime_ns == before  # not trained again
    assert "functions-vector-layer0-seed0" in err and "damaged" in err  # but the damaged one was
    again = json.loads((tmp_path / "report" / "results.json").read_text())
    assert again["tasks"]["functions"]["methods"]["vector"]["summary"] == found["methods"]["vector"]["summary"]


def test_a_sweep_over_layers_trains_only_the_curves_and_prints_them(report, tmp_path):
    status, out, err = report("--sweep", "layers", "--task", "functions", "--seeds", 1, "--layers", "0,3")
    assert status == 0, err
    names = {run.name for run in (tmp_path / "report" / "runs").iterdir()}
    assert names == {f"functions-{mode}-layer{layer}-seed0" for mode in ("vector", "lora") for layer in (0, 3)}
    [row] = [line for line in out.splitlines() if line.startswith("| functions | vector | held out")]
    at_0, at_3 = (float(cell.split()[0]) for cell in row.split("|")[4:6])
    assert at_0 > at_3 + 0.3
    assert (tmp_path / "report" / "layers.png").stat().st_size > 10_000


def test_a_model_of_one_layer_without_a_chat_template_that_learns_nothing(report, tmp_path, tiny_folder):
    from model import GPT, Config
    import torch
    torch.manual_seed(0)
    folder = tmp_path / "one-layer"
    raw = json.loads((tiny_folder / "config.json").read_text()) | {"num_hidden_layers": 1, "layer_types": None}
    GPT(Config.from_dict(raw)).save_pretrained(folder)
    shutil.copy(tiny_folder / "tokenizer.json", folder)
    settings = json.loads((tiny_folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    report.steps.update(vector="2", lora="2")
    status, out, err = report("--model", folder, "--tasks", "risk", "--seeds", 1)
    assert status == 0, err
    assert "no chat template" in out
    assert "one layer" in out
    assert "risk: skipped" in out and "chance" in out
    assert json.loads((tmp_path / "report" / "results.json").read_text())["tasks"] == {}


def test_a_failing_run_is_named_and_the_rest_goes_on(report, tmp_path):
    (tmp_path / "report" / "runs").mkdir(parents=True)
    (tmp_path / "report" / "runs" / "risk-shuffled-vector-layer0-seed0").write_text("a file where a folder should be")
    report.steps.update(vector="30", lora="2")
    status, out, err = report("--tasks", "risk", "--seeds", 1, "--layers", "0")
    assert status == 0
    assert "risk-shuffled-vector-layer0-seed0: skipped" in out
    assert "shuffled vector" not in json.loads((tmp_path / "report" / "results.json").read_text())["tasks"].get(
        "risk", {"methods": {}})["methods"]


def test_a_damaged_run_that_cannot_be_made_again_is_left_out(report, tmp_path):
    run = tmp_path / "report" / "runs" / "risk-lora-layer0-seed0"
    run.mkdir(parents=True)
    (run / "results.json").write_text("{ not json")
    report.steps.update(vector="2", lora="0")  # no LoRA can be trained
    status, out, err = report("--tasks", "risk", "--seeds", 1, "--layers", "0")
    assert status == 0
    assert "risk-lora-layer0-seed0: skipped" in out and "--steps 0" in out
    assert json.loads((tmp_path / "report" / "results.json").read_text())["runs"] == 2  # vector and shuffled vector


@pytest.mark.parametrize("flags, said", [(("--tasks", "weather"), "--tasks weather"), (("--layers", "a"), "--layers a"),
                                         (("--seeds", 0), "--seeds"), (("--model", "/nowhere/at all"), "/nowhere")])
def test_wrong_flags_end_in_one_line(report, flags, said):
    status, _, err = report(*flags)
    assert status == 2
    assert said in err and err.count("\n") == 1


def test_a_damaged_run_among_several_is_named_and_skipped(monkeypatch, capsys, tmp_path):
    good = {"task": "risk", "mode": "vector", "shuffled_answers": False, **{
        section: {"kind": {"chance": 0.5, "base": 0.5, "random": 0.5, "trained": 1.0, "questions": 3}}
        for section in ("in_distribution", "held_out")}}
    for name, text in (("good", json.dumps(good)), ("bad", "{"), ("other", '{"task": "risk"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(text)
    folders = [str(tmp_path / name) for name in ("bad", "good", "other")]
    monkeypatch.setattr("sys.argv", ["eval.py", "--mean", *folders])
    scoring.main()
    out, err = capsys.readouterr()
    assert "mean of 1 vector" in out
    assert "bad: skipped" in err and "other: skipped" in err
    monkeypatch.setattr("sys.argv", ["eval.py", "--mean", folders[0]])
    with pytest.raises(scoring.UsageError):
        scoring.main()
