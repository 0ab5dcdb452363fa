"""onnxruntime's static quantization, following "Quantize ONNX Models".

* ``quant_pre_process`` first (symbolic shapes, fused batch norms), then ``quantize_static``.
* QDQ format, uint8 activations and symmetric int8 weights, as the documentation recommends for x64;
  ``per_channel`` for per-channel thresholds. 4 bits: its types QUInt4 and QInt4.
* ``reduce_range`` is off: recommended for AVX2 without VNNI against saturation, it costs a bit of
  every weight. The files run with ``session.x64quantprecision=1`` instead, which is exact.
* Recipes: ``minmax`` (the default), ``entropy`` and ``percentile``, both with their default number
  of bins and ``CalibPercentile`` 99.999.
* One image at a time with ``CalibStridedMinMax`` 25, because its calibrators keep every activation
  of every image in memory otherwise. ``minmax`` gets all 500 images; ``entropy`` and ``percentile``
  the first 100: with 500, percentile took five times as long and gave the same 97.0 %, 19.3 dB
  (Lite0, W8A8 per channel).
"""

from __future__ import annotations

from common import Job, Refused, run

IMAGES = {"minmax": 500, "entropy": 100, "percentile": 100}
STRIDE = 25
METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}


def main(job: Job) -> None:
    """Quantize, export and evaluate."""
    import onnxruntime
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    activations = {8: QuantType.QUInt8, 4: QuantType.QUInt4}
    weights = {8: QuantType.QInt8, 4: QuantType.QInt4}
    if job.weight_bits not in weights or job.activation_bits not in activations:
        names = ", ".join(kind.name for kind in QuantType)
        raise Refused(f"no type of {job.weight_bits} bits: QuantType has {names}")

    class Reader(CalibrationDataReader):
        def __init__(self, images) -> None:
            self.images, self.range = images, iter(images)

        def __len__(self) -> int:
            return len(self.images)

        def set_range(self, start_index, end_index) -> None:
            self.range = iter(self.images[start_index:end_index])

        def get_next(self):
            image = next(self.range, None)
            return None if image is None else {"input": image[None]}

    images = job.array("train")[: IMAGES[job.recipe]]
    images = images[: len(images) // STRIDE * STRIDE]
    path, prepared = job.out / "quantized.onnx", job.out / "prepared.onnx"
    options = {"CalibStridedMinMax": STRIDE}
    if job.recipe == "percentile":
        options["CalibPercentile"] = 99.999
    with job.timed():
        quant_pre_process(job.inputs / "float.onnx", prepared)
        quantize_static(
            prepared,
            path,
            Reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=job.per_channel,
            activation_type=activations[job.activation_bits],
            weight_type=weights[job.weight_bits],
            calibrate_method=CalibrationMethod[METHODS[job.recipe]],
            extra_options=options,
        )
    job.note(images=len(images), runtime="onnxruntime", file=path.name)
    job.logits(simulated(onnxruntime, path, job))
    job.finish("onnxruntime", "onnx")


def simulated(onnxruntime, path, job: Job):
    """Run the file without fusion: quantize, dequantize and float convolutions separately."""
    import numpy as np

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": x[None]})[0] for x in job.array("val")])


run(main)
