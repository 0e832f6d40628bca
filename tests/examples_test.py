"""experiments/examples: every example runs, with a tiny codec in place of that in the package."""

import asyncio
import json
import re
from pathlib import Path

import batch_tokenize
import command
import jax
import jax_training
import language_model
import live_client
import live_server
import numpy as np
import pytest
import run_notebook
import soundfile
from aiohttp.test_utils import TestServer
from helpers import RATE

import moss_tok
from moss_tok import assets
from moss_tok.codec import codes as code_files
from moss_tok.codec import inference, pretrained

FOLDER = Path(__file__).parents[1] / "experiments" / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture(scope="module", autouse=True)
def codec(tmp_path_factory, micro):
    """`moss_tok.load()` gives a tiny codec; its folder is a checkpoint."""
    folder = tmp_path_factory.mktemp("packed") / "codec"
    pretrained.save(folder, micro.config, micro.params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "codec_folder", lambda: folder)
        yield moss_tok.load()


def codes_of(codec, wav):
    """The codes of one recording [C, S] alone; one shape for all, which compiles once."""
    return inference.encode_batch(codec, [wav], num_frames=256)[0]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A folder of five recordings with a manifest, two of them for testing."""
    folder = tmp_path_factory.mktemp("recordings")
    random = np.random.default_rng(0)
    rows = []
    for number, seconds in enumerate((0.5, 0.3, 0.41, 0.2, 0.2)):
        name = f"{number}.flac"
        soundfile.write(folder / name, 0.1 * random.standard_normal(int(seconds * RATE)), RATE)
        split = "test" if number > 2 else "train"
        rows.append({"path": name, "split": split, "domain": ("music", "speech")[number % 2]})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_classifier(recordings, capsys, monkeypatch):
    monkeypatch.setattr(jax_training, "SEGMENT_SECONDS", 0.1)
    jax_training.main([f"--data={recordings / 'manifest.jsonl'}", "--num_steps=12"])
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out[:2]] == ["step 10", "step 12"]
    assert out[2].startswith("accuracy on unseen recordings: ")
    assert out[2].endswith("(music, speech)")


def test_language_model(recordings, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "FRAMES", 10)
    data = f"--data={recordings / 'manifest.jsonl'}"
    language_model.main([str(tmp_path / "sample.wav"), data, "--num_steps=2"])
    assert "step 2: cross-entropy " in capsys.readouterr().out
    info = soundfile.info(tmp_path / "sample.wav")
    assert (info.frames, info.samplerate) == (language_model.FRAMES * 16, RATE)


def test_the_language_model_is_causal():
    model = language_model.LanguageModel(16, dim=8)
    tokens = jax.numpy.zeros((1, 12), jax.numpy.int32)

    @jax.jit
    def difference(tokens, others):
        params = model.init(jax.random.key(0), tokens)
        return model.apply(params, tokens) - model.apply(params, others)

    changed = np.asarray(difference(tokens, tokens.at[0, 5].set(3))).any((0, 2))
    assert not changed[:6].any()
    assert changed[6:].all()


def test_the_language_model_has_80_lines():
    """Without docstrings and empty lines."""
    lines = re.sub(r'"{3}.*?"{3}', "", (FOLDER / "language_model.py").read_text(), flags=re.S)
    assert len([line for line in lines.splitlines() if line.strip()]) <= 80


def test_batches(recordings, capsys, tmp_path, codec):
    options = ["--batch_size=4"]
    batch_tokenize.main([str(recordings), str(tmp_path / "codes"), *options])
    out = capsys.readouterr().out
    assert out.count("padding") == 2
    assert out.endswith("codes: 5 files\n")
    for path in sorted(recordings.glob("*.flac")):
        file = code_files.read(tmp_path / "codes" / f"{path.name}.npz", codec)
        wav = soundfile.read(path, dtype="float32")[0][None]
        assert file.num_samples == wav.shape[1]
        np.testing.assert_array_equal(file.codes, codes_of(codec, wav))
    with pytest.raises(ValueError, match="exists already"):
        batch_tokenize.main([str(recordings), str(tmp_path / "codes")])


@pytest.fixture(scope="module")
def live(codec):
    """A server with two slots, which compiles once."""
    return live_server.Server(codec, num_slots=2)


def with_server(live, check):
    """Runs `check`, a coroutine function of the server's address."""

    async def run():
        async with TestServer(live.app()) as server:
            return await check(str(server.make_url("/")))

    return asyncio.run(run())


def test_two_clients_at_once(live, recordings, codec):
    paths = [recordings / "0.flac", recordings / "2.flac"]

    async def check(url):
        streams = [
            live_client.stream(url, paths[0], 20.0),
            live_client.stream(url, paths[1], 0.0),
        ]
        return await asyncio.gather(*streams)

    for path, (codes, wav, rate) in zip(paths, with_server(live, check), strict=True):
        original = soundfile.read(path, dtype="float32")[0][None]
        expected = codes_of(codec, original)
        np.testing.assert_array_equal(codes, expected)
        decoded = inference.decode_batch(codec, [expected], num_frames=256)[0]
        decoded = decoded[:, : original.shape[1]]
        assert (rate, wav.shape) == (RATE, decoded.shape)
        np.testing.assert_allclose(wav, decoded, atol=1e-5)


def test_slots_are_free_again(live, recordings):
    """Also after a client that left without an end, and after one that sent nonsense."""
    import aiohttp

    async def check(url):
        async with aiohttp.ClientSession() as session:
            first, second = [await session.ws_connect(url) for _ in range(2)]
            for socket in (first, second):
                assert (await socket.receive_json())["num_quantizers"] == 4
            with pytest.raises(ValueError, match="all slots are in use"):
                await live_client.stream(url, recordings / "3.flac", 0.0)
            await first.send_bytes(np.full(5, np.nan, "<f4").tobytes())
            assert "finite" in (await first.receive_json())["error"]
            await second.send_bytes(np.ones(99, "<f4").tobytes())
            await second.close()
            await first.close()
        for _ in range(100):  # until the server has noticed
            try:
                return await live_client.stream(url, recordings / "3.flac", 0.0)
            except ValueError:
                await asyncio.sleep(0.05)

    codes = with_server(live, check)[0]
    assert codes.shape == (4, 100)


def test_client_and_port_errors(recordings, tmp_path, capsys):
    arguments = [str(recordings / "0.flac"), str(tmp_path / "out.wav"), "--url=http://127.0.0.1:1"]
    with pytest.raises(SystemExit) as ended:
        command.run(lambda: live_client.main(arguments))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out.wav").exists()


def test_the_notebook(capsys, monkeypatch):
    """Its cells run, and the outputs in the file are those of a run in order."""
    monkeypatch.chdir(FOLDER.parents[1])
    notebook = json.loads((FOLDER / "tour.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code[0]["metadata"]["tags"] == ["install"]
    assert [cell["execution_count"] for cell in code[1:]] == list(range(1, len(code)))
    kinds = [[output["output_type"] for output in cell["outputs"]] for cell in code[1:]]
    assert sum(outputs.count("display_data") for outputs in kinds) == 1
    assert (FOLDER / "tour.ipynb").stat().st_size < 300_000
    run_notebook.execute(notebook)
    assert [[x["output_type"] for x in cell["outputs"]] for cell in code[1:]] == kinds


def test_the_list_is_complete():
    text = (FOLDER / "README.md").read_text()
    for name in [*SCRIPTS, "tour"]:
        assert name in text or name == "command"


@pytest.mark.parametrize("name", SCRIPTS)
def test_docstrings_name_the_command(name):
    if name != "command":
        text = (FOLDER / f"{name}.py").read_text()
        assert f"    python experiments/examples/{name}.py" in text.split('"""')[1]
