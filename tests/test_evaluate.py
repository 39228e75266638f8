"""Figures of an evaluation against independent computations; engines; gates; bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toolbox import tiny_llama
from typer.testing import CliRunner

from compress import cli
from compress.calibrate.inputs import Inputs as Samples
from compress.checkpoint import open_checkpoint
from compress.engines.blocks import BlockModel
from compress.errors import CompressError, GateError, InputError, UsageError
from compress.evaluate import perplexity as perplexity_module
from compress.evaluate.command import evaluate_model
from compress.evaluate.data import Request, load_data, request_of, same_data
from compress.evaluate.divergence import Divergence, kl_of
from compress.evaluate.evaluation import Evaluator
from compress.evaluate.finished import Evaluation
from compress.evaluate.images import Accuracy
from compress.evaluate.metrics import METRICS, evaluated, report_metrics, require
from compress.evaluate.outputs import Decoded, Module
from compress.evaluate.pairs import ranks, spearman
from compress.evaluate.perplexity import Likelihood
from compress.evaluate.windows import apart, overlapping
from compress.output import open_any
from compress.plan import Options, make_plan
from compress.recipe import Gate, Recipe, parse_pass
from compress.run import RunOptions, run
from compress.survey import decide_all
from compress.trial import TrialCheckpoint

pytestmark = pytest.mark.usefixtures("one_thread")
QUANTIZE = "quantize:bits=3,group=32"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("evaluate") / "model", seed=3)


@pytest.fixture(scope="session")
def ids(model: Path) -> Path:
    path = model.parent / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 96, (6, 24)))
    return path


@pytest.fixture(scope="session")
def output(model: Path) -> Path:
    out = model.parent / "output"
    with open_checkpoint(model) as checkpoint:
        run(make_plan(checkpoint, _recipe(), Options(jobs=1)), out, RunOptions(fsync=False))
    return out


def _recipe() -> Recipe:
    return Recipe(passes=(parse_pass(QUANTIZE),))


def _refusal(*arguments: str | Path) -> CompressError:
    """The error that a command ends with."""
    error = CliRunner().invoke(cli.app, [str(a) for a in arguments]).exception
    assert isinstance(error, CompressError), error
    return error


# ------------------------------------------------------------ figures by hand


def test_likelihood_is_that_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    logits, ids = rng.standard_normal((9, 40)) * 4, rng.integers(0, 40, 9)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -log_p[np.arange(8), ids[1:]]
    for values, scored in ((1 << 22, 8), (80, 8), (1, 5)):
        monkeypatch.setattr(perplexity_module, "CHUNK_VALUES", values)
        found = Likelihood()
        found.add(torch.tensor(logits), torch.tensor(ids), scored)
        assert found.tokens == scored
        assert found.total == pytest.approx(expected[8 - scored :].sum(), rel=1e-6)
    assert found.perplexity == pytest.approx(np.exp(expected[3:].mean()), rel=1e-6)


def test_divergence_is_that_of_float64() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 30, 50))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a, b))
    found = Divergence()
    found.add(torch.tensor(a[:11]), torch.tensor(b[:11]))
    found.add(torch.tensor(a[11:]), torch.tensor(b[11:]))
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    assert found.top1_agreement == (a.argmax(1) == b.argmax(1)).mean()
    same = Divergence()
    same.add(torch.tensor(a), torch.tensor(a))
    assert (same.kl, same.top1_agreement) == (0.0, 1.0)


def test_a_class_that_the_reference_rules_out_costs_nothing() -> None:
    found = Divergence()
    found.add(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]]))
    assert found.kl == pytest.approx(np.log(2))
    with pytest.raises(InputError, match="the model's predictions are"):
        found.add(torch.zeros(1, 2), torch.zeros(1, 3))


def test_ranks_and_spearman_share_ties() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4, 1, 4, 2, 4]
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: 4.5 / sqrt(4.5 * 5)
    tied = spearman(np.array([0.0, 5.0, 5.0, 9.0]), np.array([1.0, 3.0, 2.0, 4.0]))
    assert tied == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(spearman(x, np.ones(4)))


def test_accuracy_and_its_paired_error() -> None:
    labels = np.array([0, 1, 1, 0])
    logits = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])  # right, wrong, right, wrong
    reference = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1]])  # right, right, right, wrong
    seen = Accuracy()
    seen.add(logits, labels, reference)
    assert (seen.accuracy, seen.accuracy_reference, seen.drop) == (50, 75, 25)
    # differences 0, 1, 0, 0: variance 1/4 with n - 1, over 4 images
    assert seen.drop_error == pytest.approx(100 * np.sqrt(0.25 / 4))
    with pytest.raises(InputError, match="labels go from 0 to 2"):
        seen.add(logits[:2], np.array([0, 2]), None)
    with pytest.raises(InputError, match=r"not \[4, classes\]"):
        seen.add(torch.zeros(4, 2, 1), labels, None)


def test_overlapping_windows_score_every_token_once() -> None:
    stream = np.arange(100, 121)
    windows = overlapping(stream, (1,), 9, 4)
    assert all(len(w.ids) == 9 and w.ids[0] == 1 for w in windows)
    scored = np.concatenate([w.ids[len(w.ids) - w.scored :] for w in windows])
    assert scored.tolist() == stream[:20].tolist()  # the last one fills no window
    assert overlapping(stream, (), 8, 8)[0].scored == 7  # nothing stands before its first token
    with pytest.raises(UsageError, match="from 1 to the 8"):
        overlapping(stream, (1,), 9, 9)
    with pytest.raises(UsageError, match="21 tokens, one window has 63"):
        overlapping(stream, (1,), 64, 4)


def test_samples_of_other_lengths_are_cut_at_their_end() -> None:
    padded = np.array([[5, 6, 7], [8, 9, -1]], np.int32)
    windows = apart(Samples("documents", {"input_ids": padded}, "", ""))
    assert [w.ids.tolist() for w in windows] == [[5, 6, 7], [8, 9]]
    assert [w.scored for w in windows] == [2, 1]


# ------------------------------------------------------------ real models


def _expected(folder: Path, sequences: list[list[int]]) -> float:
    """Perplexity by transformers alone."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = count = 0.0
    with torch.no_grad():
        for sequence in sequences:
            logits = model(torch.tensor([sequence])).logits[0, :-1].double()
            total += float(
                torch.nn.functional.cross_entropy(
                    logits, torch.tensor(sequence[1:]), reduction="sum"
                )
            )
            count += len(sequence) - 1
    return float(np.exp(total / count))


def test_documents_of_a_real_decoder(shared_dir: Path) -> None:
    import transformers

    folder, text = shared_dir / "models/stories260k", shared_dir / "data/stories_eval.txt"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    documents = text.read_text().split("\n\n")[:4]
    sequences = [tokenizer(d.strip("\n")).input_ids[:100] for d in documents]
    body = evaluate_model(folder, Request("text", text, window=100, samples=4, documents=True))
    assert body["metrics"]["perplexity"] == pytest.approx(_expected(folder, sequences), rel=1e-5)
    assert body["metrics"]["tokens"] == sum(len(s) - 1 for s in sequences)
    assert body["data"]["window"] == 100


def test_windows_of_a_real_decoder(shared_dir: Path) -> None:
    import transformers

    folder, text = shared_dir / "models/tiny-llama-en", shared_dir / "data/wikitext2_test.txt"
    part = "\n".join(text.read_text().split("\n")[:60])
    ids = transformers.AutoTokenizer.from_pretrained(folder)(part).input_ids[1:]
    body = evaluate_model(folder, Request("text", text, window=256, samples=2))
    sequences = [[0, *ids[:255]], [0, *ids[255:510]]]
    assert body["metrics"]["perplexity"] == pytest.approx(_expected(folder, sequences), rel=1e-5)
    assert body["metrics"]["tokens"] == 510


def test_sentence_pairs_of_a_real_encoder(minilm: Path, shared_dir: Path, tmp_path: Path) -> None:
    import transformers

    lines = (shared_dir / "data/stsb_en_test.csv").read_text().splitlines()[:12]
    data = tmp_path / "pairs.csv"
    data.write_text("\n".join(lines))
    body = evaluate_model(minilm, Request("pairs", data), reference=minilm)
    assert body["metrics"]["cosine"] == pytest.approx(1)
    assert body["metrics"]["spearman_drop"] == 0

    # Independently: all sentences padded to one length, pooled under the mask.
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    encoder = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32)
    with open_any(minilm) as checkpoint:
        pairs: Any = load_data(Request("pairs", data), checkpoint)
    texts = [tokenizer.decode(i["input_ids"], skip_special_tokens=True) for i in pairs.sentences]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = encoder(**batch).last_hidden_state * batch["attention_mask"][:, :, None]
    mean = torch.nn.functional.normalize(hidden.sum(1), dim=1).double().numpy()
    cosines = (mean[:12] * mean[12:]).sum(1)
    assert body["metrics"]["spearman"] == pytest.approx(100 * spearman(cosines, pairs.scores))
    with pytest.raises(InputError, match="does not predict the next token"):
        evaluate_model(minilm, Request("text", data, window=16))


# ------------------------------------------------------------ engines


def test_kernels_say_what_decoded_weights_say(model: Path, output: Path, ids: Path) -> None:
    request = Request("text", ids, ids=True)
    decoded = evaluate_model(output, request, reference=model)
    packed = evaluate_model(output, request, reference=model, engine="kernels")
    assert packed["model_engine"]["engine"] == "kernels"
    assert decoded["metrics"]["kl"] > 0
    for name, value in decoded["metrics"].items():
        assert packed["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-6)


def test_a_trial_diverges_as_its_output_does(model: Path, output: Path, ids: Path) -> None:
    values = np.load(ids)
    with open_checkpoint(model) as source, open_any(output) as candidate:
        plan = decide_all(make_plan(source, _recipe(), Options(jobs=1)), lambda *_: None)
        expected = Evaluator(
            load_data(Request("text", ids, ids=True), source), Decoded(source)
        ).run(Decoded(candidate))["kl"]
        assert kl_of(source, candidate, values) == pytest.approx(expected, rel=1e-9)
        assert kl_of(source, TrialCheckpoint(plan), values) == pytest.approx(expected, rel=1e-9)
        assert kl_of(source, source, values) == 0


def test_groups_of_sequences_change_nothing(
    model: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request("text", ids, ids=True)
    whole = evaluate_model(model, request)["metrics"]
    monkeypatch.setattr("compress.evaluate.outputs.HELD_BYTES", 1)
    assert evaluate_model(model, request)["metrics"] == whole


def test_blocks_that_are_run_several_times(tmp_path: Path) -> None:
    """ALBERT has fewer blocks than layers: one that is run once gives other figures."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=40, embedding_size=8, hidden_size=16, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=24, max_position_embeddings=16,
        initializer_range=0.4,
    )  # fmt: skip
    albert = transformers.AlbertModel(config).eval()
    albert.save_pretrained(tmp_path)
    ids = np.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = albert(torch.from_numpy(ids)).last_hidden_state
    with open_checkpoint(tmp_path) as checkpoint:
        (found,) = Decoded(checkpoint).run([{"input_ids": ids}], "last_hidden_state")
        assert torch.allclose(found, expected, atol=1e-5)
        with pytest.raises(UsageError, match="3 layers, 1 in"):
            BlockModel(checkpoint)


def _onnx(
    path: Path, inputs: list[Any], outputs: list[Any], nodes: list[Any], **table: Any
) -> Path:
    import onnx
    from onnx import helper, numpy_helper

    graph = helper.make_graph(
        nodes, "g", inputs, outputs, [numpy_helper.from_array(v, n) for n, v in table.items()]
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


@pytest.fixture
def bigram(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A decoder whose logits are a row of a table, with the inputs that exporters make."""
    from onnx import TensorProto as T
    from onnx import helper

    table = np.random.default_rng(5).standard_normal((96, 96)).astype(np.float32)
    value = helper.make_tensor_value_info
    inputs = [
        value("input_ids", T.INT64, ["batch", "length"]),
        value("attention_mask", T.INT32, ["batch", "length"]),
        value("past_key_values.0.key", T.FLOAT16, ["batch", 2, "past", 8]),
    ]
    outputs = [value("logits", T.FLOAT, ["batch", "length", 96])]
    node = helper.make_node("Gather", ["table", "input_ids"], ["logits"])
    return _onnx(tmp_path / "model.onnx", inputs, outputs, [node], table=table), table


def test_an_onnx_decoder(bigram: tuple[Path, np.ndarray], ids: Path, model: Path) -> None:
    path, table = bigram
    body = evaluate_model(path, Request("text", ids, ids=True), reference=model)
    rows = np.load(ids)
    log_p = table - np.log(np.exp(table.astype(np.float64)).sum(1, keepdims=True))
    expected = np.exp(-log_p[rows[:, :-1], rows[:, 1:]].mean())
    assert body["metrics"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert body["metrics"]["kl"] > 0
    assert body["reference_engine"]["engine"] == "decoded"
    assert "onnxruntime" in body["model_engine"]


def test_an_onnx_classifier(tmp_path: Path) -> None:
    from onnx import TensorProto as T
    from onnx import helper

    rng = np.random.default_rng(6)
    weight = rng.standard_normal((12, 5)).astype(np.float32)
    images, labels = rng.integers(0, 256, (230, 2, 2, 3), np.uint8), rng.integers(0, 5, 230)
    value = helper.make_tensor_value_info
    path = _onnx(
        tmp_path / "classifier.onnx",
        [value("pixels", T.FLOAT, ["n", 3, 2, 2])],
        [value("scores", T.FLOAT, ["n", 5])],
        [
            helper.make_node("Flatten", ["pixels"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["scores"]),
        ],
        weight=weight,
    )
    data = tmp_path / "images.npz"
    np.savez(data, images=images, labels=labels)
    flat = (images.transpose(0, 3, 1, 2) / np.float32(255)).reshape(230, 12)
    right = (flat @ weight).argmax(1) == labels
    found = evaluate_model(path, Request("images", data), reference=path)["metrics"]
    assert found["accuracy"] == pytest.approx(100 * right.mean())
    assert (found["accuracy_drop"], found["kl"], found["images"]) == (0, 0, 230)

    class Linear(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.flatten(1) @ torch.from_numpy(weight)

    with open_checkpoint(tiny_llama(tmp_path / "any", layers=1)) as checkpoint:
        images_data = load_data(Request("images", data), checkpoint)
    own = Evaluator(images_data).run(Module(Linear(), "own"))
    assert own == {"accuracy": found["accuracy"], "images": 230.0}

    np.savez(data, images=images[:, :1], labels=labels)
    with pytest.raises(InputError, match=r"images of the shape .* do not fit"):
        evaluate_model(path, Request("images", data))
    with pytest.raises(InputError, match="no decoder: inputs pixels"):
        ids = tmp_path / "ids.npy"
        np.save(ids, np.ones((1, 4), np.int64))
        evaluate_model(path, Request("text", ids, ids=True))


# ------------------------------------------------------------ gates and data


def test_every_figure_is_known_to_gates_and_is_computed_as_the_table_says(
    model: Path, output: Path, ids: Path
) -> None:
    request = Request("text", ids, ids=True)
    for reference in (None, model):
        body = evaluate_model(output, request, reference=reference)
        wanted = evaluated("text", reference=reference is not None)
        assert sorted(body["metrics"]) == sorted(wanted)
    for name in METRICS:
        assert Gate.parse(f"{name}>1").metric == name
    assert set(report_metrics()) == {n for n, m in METRICS.items() if not m.kinds}


@pytest.mark.parametrize(
    ("gate", "kind", "reference", "report", "words"),
    [
        ("kl>1", "text", False, False, "--reference"),
        ("kl>1", None, True, True, "--eval-text or --eval-images"),
        ("spearman<80", "text", True, False, "--pairs"),
        ("accuracy<80", "pairs", True, True, "--eval-images"),
        ("bytes>1", "text", True, False, "compress run"),
    ],
)
def test_a_gate_on_what_is_not_computed_is_refused(
    gate: str, kind: str | None, reference: bool, report: bool, words: str
) -> None:
    with pytest.raises(UsageError, match="is not computed") as error:
        require([Gate.parse(gate)], kind, reference=reference, report=report)
    assert words in error.value.message
    assert "computed here" in (error.value.hint or "")


def test_a_failed_gate_publishes_nothing_and_still_reports(
    model: Path, ids: Path, tmp_path: Path
) -> None:
    request = request_of(ids, None, None)
    assert request is not None
    report = tmp_path / "report.json"
    with open_checkpoint(model) as checkpoint:
        plan = make_plan(checkpoint, _recipe(), Options(jobs=1))
        evaluation = Evaluation(checkpoint, request)
        gates = (Gate.parse("kl>1e-9"),)
        with pytest.raises(GateError, match=r"kl is .* the gate fails at kl>1e-09"):
            run(plan, tmp_path / "out", RunOptions(False, report_file=report, gates=gates,
                                                   evaluation=evaluation))  # fmt: skip
        assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock") == ["report.json"]
        failed = json.loads(report.read_bytes())["evaluation"]["metrics"]
        gates = (Gate.parse("kl>10"), Gate.parse("bytes>1e9"))
        made = run(plan, tmp_path / "out", RunOptions(False, gates=gates, evaluation=evaluation))
    assert made.metrics["kl"] == failed["kl"] > 1e-9
    stored = json.loads((tmp_path / "out/report.json").read_bytes())
    assert stored["evaluation"]["metrics"]["kl"] == failed["kl"]
    assert evaluate_model(tmp_path / "out", Request("text", ids, ids=True), reference=model)[
        "metrics"
    ]["kl"] == pytest.approx(failed["kl"], rel=1e-9)


def test_calibration_on_the_evaluation_data_is_said(model: Path, ids: Path) -> None:
    request = request_of(ids, None, None)
    assert request is not None
    with open_checkpoint(model) as checkpoint:
        evaluation = Evaluation(checkpoint, request)
    own = dict(evaluation.data.record)
    assert "flatter" in evaluation.warnings(own)[0]
    assert evaluation.warnings({"file_sha256": "0", "digest": "1"}) == []
    assert evaluation.warnings(None) == []
    assert same_data({"digest": own["digest"]}, own)
    assert not same_data({}, {})


def test_the_command_and_its_exit_code(
    model: Path, output: Path, ids: Path, tmp_path: Path
) -> None:
    report = tmp_path / "e.json"
    arguments = ["eval", output, "--reference", model, "--ids", ids, "--report", report]
    gates = ["--fail-if", "kl>0", "--fail-if", "top1_agreement<0"]
    done = CliRunner().invoke(cli.app, [str(a) for a in [*arguments, *gates]])
    assert isinstance(done.exception, GateError)
    assert done.exception.exit_code == 4
    assert "the gate fails at kl>0" in done.exception.message
    assert "perplexity: " in done.stdout
    body = json.loads(report.read_bytes())
    assert body["metrics"]["kl"] > 0
    assert len(body["failed_gates"]) == 1
    assert body["data"]["tokens_scored"] == 6 * 23


def test_bad_options_are_refused_before_anything_is_opened(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for arguments, words in (
        ((), "no data"),
        (("--text", "a", "--pairs", "b"), "one kind of data"),
        (("--text", "a", "--fail-if", "kl>1"), "needs --reference"),
        (("--text", "a", "--fail-if", "ppl>1"), "unknown metric"),
        (("--ids", "a", "--window", "8"), "--window does nothing with --ids"),
        (("--images", "a", "--documents"), "--documents does nothing"),
        (("--text", "a", "--documents", "--stride", "8"), "--stride with --documents"),
        (("--images", "a"), "--module"),
        (("--text", "a", "--engine", "gpu"), "--engine gpu: unknown"),
        (("--text", "a", "--engine", "onnx"), "no .onnx file"),
        (("--text", "a", "--engine", "decoded", "--module", "f.py:f"), "belong together"),
    ):
        error = _refusal("eval", nowhere, *arguments)
        assert error.exit_code == 2
        assert words in error.message + str(error.hint)
    error = _refusal("run", nowhere, "-o", tmp_path / "o", QUANTIZE, "--fail-if", "kl>0.1")
    assert (error.exit_code, "--eval-text" in error.message) == (2, True)
    error = _refusal("run", nowhere, "-o", tmp_path / "o", QUANTIZE, "--eval-window", "8")
    assert "need data" in error.message


def test_bad_data_is_refused(model: Path, ids: Path, tmp_path: Path, shared_dir: Path) -> None:
    real = shared_dir / "models/stories260k"
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time")
    many = tmp_path / "many.npy"
    np.save(many, np.full((2, 8), 96))
    for arguments, words, code in (
        ((real, "--text", text), "one sample of 512 needs", 2),
        ((real, "--text", tmp_path / "none.txt"), "cannot read", 2),
        ((model, "--text", text), "no tokenizer", 3),
        ((model, "--ids", many), "out of the model's vocabulary of 96", 3),
        ((model, "--ids", ids, "--reference", real), "of 512", 2),
        ((tmp_path / "none.onnx", "--ids", ids), "no such file", 2),
        ((text.with_suffix(".onnx"), "--ids", ids), "no ONNX model", 3),
    ):
        if arguments[0] == text.with_suffix(".onnx"):
            text.with_suffix(".onnx").write_bytes(b"no graph")
        error = _refusal("eval", *arguments)
        assert (error.exit_code, words in error.message) == (code, True), error.message
    assert "--window" in str(_refusal("eval", real, "--text", text).hint)
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("a,b,1\nc,d,1\n")
    error = _refusal("eval", real, "--pairs", pairs)
    assert "every pair has the score 1" in error.message
