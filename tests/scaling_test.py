"""experiments/scaling: power laws, points of the studies, resuming, reports; without training."""

import json
import sys
from pathlib import Path

import fits
import heldout
import jax
import numpy as np
import points
import pytest
import report
import study
from helpers import PRETRAIN, make_clips, small_run

from moss_tok import settings
from moss_tok.codec import pretrained
from moss_tok.codec.config import TransformerConfig, read_codec_config
from moss_tok.objectives.config import all_fields, configure
from moss_tok.training import start

FOLDER = Path(__file__).parents[1] / "experiments" / "scaling"
DOMAINS = ["music"] * 4 + ["speech"] * 8
SIZES = np.array([1e6, 2e6, 5e6, 1.5e7])


def law_losses(x, noise=0.0, num_seeds=1, exponent=0.1):
    """Losses [P, seeds, recordings] of a power law; every recording has its own level."""
    random = np.random.default_rng(0)
    levels = random.uniform(0.5, 2.0, len(DOMAINS))
    losses = 40 * np.asarray(x)[:, None, None] ** -exponent * levels
    return losses * np.exp(noise * random.standard_normal((len(x), num_seeds, len(DOMAINS))))


def test_a_fit_finds_the_law():
    law = fits.fit(SIZES, 30 * SIZES**-0.08)
    np.testing.assert_allclose([law.scale, law.exponent], [30, 0.08], rtol=1e-9)
    np.testing.assert_allclose(law(SIZES), 30 * SIZES**-0.08)
    several = fits.fit(SIZES, np.stack([30 * SIZES**-0.08, 20 * SIZES**-0.2]))
    np.testing.assert_allclose(several.exponent, [0.08, 0.2])
    assert several(SIZES).shape == (2, 4)
    with pytest.raises(ValueError, match="two different sizes"):
        fits.fit(SIZES[:1], np.ones(1))


def test_bands_come_from_the_recordings_and_seeds():
    exact = fits.bootstrap(SIZES, law_losses(SIZES), DOMAINS)
    assert exact.exponent_interval() == pytest.approx((0.1, 0.1))
    low, high = exact.band(SIZES)
    assert (low < exact.law(SIZES)).all() and (exact.law(SIZES) < high).all()  # their levels differ
    noisy = fits.bootstrap(SIZES, law_losses(SIZES, 0.05, num_seeds=3), DOMAINS)
    low, high = noisy.exponent_interval()
    assert low < 0.1 < high
    assert 0.003 < high - low < 0.1


def test_domains_count_equally():
    losses = np.array([1.0] * 4 + [2.0] * 8)
    assert fits.mean_loss(losses, DOMAINS) == 1.5


def test_the_largest_is_predicted_from_the_others():
    losses = law_losses(SIZES)
    order = [3, 0, 2, 1]
    prediction = fits.predict_largest(SIZES[order], losses[order], DOMAINS)
    assert prediction.error == pytest.approx(0, abs=1e-9)
    losses[3] *= 1.1  # worse than the law says
    prediction = fits.predict_largest(SIZES, losses, DOMAINS)
    assert prediction.error == pytest.approx(1 / 1.1 - 1)
    assert prediction.low < prediction.predicted < prediction.high


def test_frontier():
    compute = np.array([4.0, 1.0, 2.0, 3.0, 3.0])
    losses = np.array([1.0, 5.0, 3.0, 3.5, 2.0])
    assert fits.frontier(compute, losses).tolist() == [1, 2, 4, 0]


def test_the_family(tmp_path):
    points.write_models(tmp_path)
    counts = []
    for size in points.SIZES:
        config = read_codec_config(points.model_path(tmp_path, size))
        assert config.frame_rate == 25
        if size in ("1M", "15M"):
            leaves = jax.tree.leaves(pretrained.param_shapes(config))
            counts.append(sum(leaf.size for leaf in leaves))
    assert counts == [1_265_120, 14_713_120]
    assert read_codec_config(tmp_path / "6M.json") == read_codec_config(points.SMALL_CODEC)
    deep = read_codec_config(points.model_path(tmp_path, points.DEEP))
    layers = [module.num_layers for module in deep.encoder if isinstance(module, TransformerConfig)]
    assert layers == [8, 16, 16]


def base_flags():
    lines = (FOLDER / "base.flags").read_text().splitlines()
    return dict(line[2:].split("=", 1) for line in lines if line.startswith("--"))


@pytest.mark.parametrize("name", ["sizes", "joint", "dropout", "batch", "streams"])
def test_points_are_runs(name, tmp_path):
    """Names are unique, starts come first, and train.py takes the flags."""
    types = {name: type(settings.flag_default(field)) for name, field in all_fields().items()}
    seen = []
    for point in points.STUDIES[name](40, 2):
        assert point not in seen
        assert point.start is None or point.start in seen
        seen.append(point)
        flags = base_flags() | point.flags(tmp_path, "data.jsonl")
        config = configure(**{key: types[key](value) for key, value in flags.items()})
        if point.start:
            step = point.cools_from or 40
            assert config.run.init_from == f"{tmp_path}/{point.start.name}/checkpoints/{step:08d}"
        if point.cools_from:
            assert config.run.num_steps == config.optimizer.decay_steps == point.cools_from // 3
        else:
            assert config.run.num_steps * config.data.batch_size in (320, 640)
            assert config.optimizer.decay_steps == 0
        assert config.run.num_steps % config.run.checkpoint_every == 0
    assert len({point.name for point in seen}) == len(seen)
    by_all = {
        point.name: point for points_of in points.STUDIES.values() for point in points_of(40, 2)
    }
    assert all(by_all[point.name] == point for point in seen)  # studies share their baselines


def result_of(point, loss=1.0):
    """What heldout.py writes, without training."""
    width = points.SIZES.get(point.size, 4)
    last = str(point.num_steps)
    steps = {str(point.num_steps // 2): {"16": [1.2 * loss] * len(DOMAINS)}}
    steps[last] = {n: [loss * (1 + 1 / int(n))] * len(DOMAINS) for n in ("1", "4", "16")}
    return {
        "parameters": 10000 * width**2,
        "flops_per_step": 1e9 * width**2,
        "domains": DOMAINS,
        "losses": steps,
    }


class Runner:
    """Stands in for train.py and heldout.py; `failing` is a word in a command that fails once."""

    def __init__(self, study, failing=""):
        self.by_name = {point.name: point for point in study}
        self.failing = failing
        self.commands = []

    def __call__(self, command, log):
        script = Path(command[1]).name
        self.commands.append((script, log.parent.name))
        assert command[0] == sys.executable
        assert log.parent.is_dir()
        if self.failing and self.failing in " ".join(command):
            self.failing = ""
            return 143
        if script == "heldout.py":
            point = self.by_name[Path(command[2]).name]
            assert command[4] == str(point.num_steps)
            Path(command[3]).write_text(json.dumps(result_of(point)))
        return 0


def test_a_study_resumes(tmp_path):
    chosen = points.sizes(40, 1)
    run = Runner(chosen, failing="size-3M-seed0")
    with pytest.raises(ValueError, match=r"train.py ended with exit code 143; see .*log.txt"):
        study.complete(chosen, tmp_path, "data.jsonl", run)
    first = [("train.py", "size-1M-seed0"), ("heldout.py", "size-1M-seed0")]
    for step in (10, 20, 30, 40):
        name = f"cooldown-1M-{step}-seed0"
        first += [("train.py", name), ("heldout.py", name)]
    assert run.commands == [*first, ("train.py", "size-3M-seed0")]

    run.commands.clear()
    results = study.complete(chosen, tmp_path, "data.jsonl", run)
    assert list(results) == chosen
    assert run.commands[0] == ("train.py", "size-3M-seed0")
    assert len(run.commands) == 3 * len(first)

    run.commands.clear()
    assert study.complete(chosen, tmp_path, "data.jsonl", run) == results
    assert run.commands == []

    chosen = points.dropout(40, 1)
    run = Runner(chosen)
    study.complete(chosen, tmp_path, "data.jsonl", run)
    trained = [name for script, name in run.commands if script == "train.py"]
    assert trained == ["dropout0-1M-seed0", "dropout1-1M-seed0"]  # 0.5 is the baseline


def test_a_study_may_get_longer_but_nothing_else(tmp_path):
    chosen = points.sizes(40, 1)
    study.complete(chosen, tmp_path, "data.jsonl", Runner(chosen))
    longer = points.sizes(80, 1)
    run = Runner(longer)
    study.complete(longer, tmp_path, "data.jsonl", run)
    continued = [name for _, name in run.commands if name.startswith("size-")]
    assert len(continued) == 8
    cooled = {name for _, name in run.commands if name.startswith("cooldown-")}
    assert len(cooled) == 8  # from steps 60 and 80; there were cooldowns from 20 and 40
    with pytest.raises(ValueError, match="made with another train_data: choose another --out"):
        study.complete(chosen, tmp_path, "other.jsonl", run)
    assert len(run.commands) == 24


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        (
            "sizes",
            4,
            ["before the cooldown |", "parameters^-", "The largest, predicted from the others: "],
        ),
        ("joint", 4, ["frozen encoder: loss = ", "+0.000 (+0.000 to +0.000)"]),
        ("dropout", 3, ["| quantizer dropout | 1 quantizer | 4 quantizers |", "| 0.5 | 2.000 |"]),
        ("batch", 4, ["| 16 | 20 | 0.0021 |"]),
        ("streams", 2, ["| bfloat16 | 1.200 | 1.062 |", "+0.000 (+0.000 to +0.000)"]),
    ],
)
def test_reports(tmp_path, name, rows, words):
    results = {}
    for point in points.STUDIES[name](40, 2):
        loss = points.SIZES[point.size] ** -0.2 if name in ("sizes", "batch") else 1.0
        results[point] = result_of(point, loss)
    text = report.write(name, results, tmp_path)
    assert (tmp_path / f"{name}.md").read_text() == text + "\n"
    assert len([line for line in text.splitlines() if line.startswith("|")]) == rows + 2
    for word in words:
        assert word in text
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_heldout_loss(tmp_path, micro):
    """Of a workdir with two checkpoints, as train.py leaves it."""
    clips = tmp_path / "clips"
    clips.mkdir()
    flags = small_run(PRETRAIN | {"mel_windows": "64"}, make_clips(clips), tmp_path)
    workdir = tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    start.write_config(workdir, configure(**flags))
    for step in (1, 2):
        folder = workdir / "checkpoints" / f"{step:08d}"
        params = jax.tree.map(lambda x, step=step: np.asarray(x) * (1.5 - 0.5 * step), micro.params)
        pretrained.save(folder, micro.config, params)
    assert list(heldout.measure_run(workdir, 1)["losses"]) == [1]
    result = heldout.measure_run(workdir, 2)
    assert result["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(micro.params))
    assert result["domains"] == ["speech", "speech"]
    assert list(result["losses"]) == [1, 2]
    assert list(result["losses"][1]) == [16]
    assert list(result["losses"][2]) == [1, 4, 16]
    assert result["losses"][2][4] == result["losses"][2][16]  # the codec has four
    assert all(0 < loss < 100 for loss in result["losses"][2][1])
    with pytest.raises(ValueError, match="run: no checkpoint of step 3"):
        heldout.measure_run(workdir, 3)
    with pytest.raises(ValueError, match="no run of train.py"):
        heldout.measure_run(tmp_path, 2)


def test_user_errors(tmp_path, capsys):
    assert study.main(["sizes", "--num_steps=0", f"--out={tmp_path}"]) == 2
    assert capsys.readouterr().err == "error: num_steps must be at least 1, got 0\n"
