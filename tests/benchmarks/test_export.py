"""The benchmark of exported files, at sizes at which its latencies mean nothing."""

import json

import pytest

from benchmarks.export import QUICK, main

pytest.importorskip("onnxruntime")


def test_a_tiny_run(tmp_path, capsys):
    output = tmp_path / "deep" / "export.json"
    arguments = ["--quick", "--strategy", "hash", "low_rank", "quantize", "--kinds", "pt2", "onnx", "fbgemm"]
    assert main([*arguments, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    by_name = {}
    for row in found["results"]:
        by_name.setdefault(row["name"], {})[row["kind"]] = row
    for kind in ("eager", "pt2", "onnx"):
        row = by_name["hash"][kind]
        assert set(row["latency"]) == {str(size) for size in QUICK.batches}
        assert all(value > 0 for value in row["latency"].values())
        assert row["difference"] < 1e-5
        assert row["serve_bytes"] <= 0.3 * sum(spec.full_bytes for spec in QUICK.specs()) + 1e-6
        assert kind == "eager" or row["file_bytes"] > row["serve_bytes"]
    assert by_name["hash"]["fbgemm"]["file_bytes"] is None
    assert "shares rows" in by_name["hash"]["fbgemm"]["note"]
    text = capsys.readouterr().out
    head = next(line for line in text.splitlines() if line.startswith("|  | to serve"))
    assert head == "|  | to serve | pt2 | onnx | fbgemm |"
    assert f"| hash | {by_name['hash']['pt2']['serve_bytes']:,} | {by_name['hash']['pt2']['file_bytes']:,} |" in text
    assert "- hash, fbgemm: strategy 'hash' shares rows" in text


def test_peers(tmp_path):
    pytest.importorskip("torchrec")
    from benchmarks.export_peers import peers
    from embcomp import TableSpec

    found = {name: size for name, size, _ in peers([TableSpec("item", 1000, 16)])}
    assert list(found) == ["TorchRec, float32", "TorchRec, int8", "TorchRec, int4"]
    assert 64_000 < found["TorchRec, float32"] < 68_000
    assert 32_000 < found["TorchRec, int8"] < 36_000  # rows of 20 bytes lie at multiples of 16
