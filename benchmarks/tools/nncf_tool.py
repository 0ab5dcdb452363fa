"""NNCF on OpenVINO, after its documentation "Basic Quantization Flow" and "Advanced Quantization".

* ``nncf.quantize`` on the float ONNX file as an OpenVINO model, preset MIXED (symmetric weights,
  asymmetric activations), no ``model_type``, its default subset of 300 images, one at a time.
* ``fast``: fast bias correction, its default. ``accurate``: ``fast_bias_correction=False``, which
  the documentation advises where accuracy is not enough.
* One threshold per tensor and other bits than 8 by ``weights_quantization_params`` and
  ``activations_quantization_params`` of the advanced parameters.
* ``overflow_fix`` stays at its default there, half the range for the first layer's weights.
  ``overflow``: as ``accurate``, with half the range for all weights, which its documentation has
  for processors without VNNI: on AVX2 alone OpenVINO's int8 kernels saturate.
* The simulation is the model with OpenVINO's low-precision transformations switched off, so that
  FakeQuantize and float convolutions are computed as they stand. What ships is compiled as it is.
"""

from __future__ import annotations

from collections import Counter

from common import SHIPPED, Job, run

IMAGES = 300
LAYERS = ("Convolution", "FullyConnected", "MatMul")


def main(job: Job) -> None:
    """Quantize, write, judge."""
    import nncf
    import numpy as np
    import openvino as ov
    from nncf.quantization.advanced_parameters import QuantizationParameters

    core = ov.Core()
    model = ov.convert_model(job.inputs / "float.onnx")
    images = job.array("train")[:IMAGES]
    path = job.out / "quantized.xml"
    advanced = nncf.AdvancedQuantizationParameters()
    if job.bits != (8, 8) or not job.vector:
        advanced.weights_quantization_params = QuantizationParameters(
            num_bits=job.weight_bits, per_channel=job.vector
        )
        advanced.activations_quantization_params = QuantizationParameters(
            num_bits=job.activation_bits
        )
    if job.recipe == "overflow":
        advanced.overflow_fix = nncf.OverflowFix.ENABLE
    with job.timed():
        quantized = nncf.quantize(
            model,
            nncf.Dataset(list(images), lambda image: image[None]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=IMAGES,
            fast_bias_correction=job.recipe == "fast",
            advanced_parameters=advanced,
        )
        ov.save_model(quantized, path, compress_to_fp16=False)
    val = job.array("val")
    options = {"INFERENCE_NUM_THREADS": job.threads, "INFERENCE_PRECISION_HINT": "f32"}

    def logits(compiled):
        return np.concatenate([next(iter(compiled(image[None]).values())) for image in val])

    simulated = core.compile_model(
        core.read_model(path), "CPU", {**options, "LP_TRANSFORMS_MODE": False}
    )
    job.logits(logits(simulated))
    compiled = core.compile_model(core.read_model(path), "CPU", options)
    job.logits(logits(compiled), SHIPPED)
    integer, in_float = layers(compiled)
    job.note(
        images=IMAGES,
        simulated_layers=layers(simulated),
        shipped={
            "runtime": f"openvino {ov.__version__.split('-')[0]}",
            "integer_layers": integer,
            "float_layers": in_float,
            "size_mb": path.with_suffix(".bin").stat().st_size / 1e6,
        },
    )
    job.finish("nncf", "openvino")


def layers(compiled) -> tuple[int, int]:
    """How many layers the compiled model computes in integers, and how many in float."""
    counts: Counter[bool] = Counter()
    for operator in compiled.get_runtime_model().get_ordered_ops():
        told = {key: str(value.value) for key, value in operator.get_rt_info().items()}
        if told["layerType"] in LAYERS:
            counts[told["runtimePrecision"] in ("u8", "i8", "u4", "i4")] += 1
    return counts[True], counts[False]


run(main)
