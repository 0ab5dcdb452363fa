"""NNCF on OpenVINO, following "Basic Quantization Flow" and "Advanced Quantization".

* ``nncf.quantize`` on the float ONNX file as an OpenVINO model, preset MIXED (symmetric weights,
  asymmetric activations), no ``model_type``, its default subset of 300 images, one at a time.
* ``fast``: fast bias correction, its default. ``accurate``: ``fast_bias_correction=False``, which
  the documentation recommends where the accuracy is not sufficient.
* Per-tensor weights and other bits than 8: ``weights_quantization_params`` and
  ``activations_quantization_params`` of the advanced parameters.
* ``overflow_fix`` keeps its default in both, half the range for the weights of the first layer.
  ``overflow`` is ``accurate`` with half the range for all weights, which the documentation has for
  processors without VNNI: with AVX2 alone, OpenVINO's int8 kernels saturate.
* Simulation: the model with OpenVINO's low-precision transformations switched off, so FakeQuantize
  and float convolutions are computed separately. File: compiled with defaults.
"""

from __future__ import annotations

from collections import Counter

from common import SHIPPED, Job, run

IMAGES = 300
LAYERS = ("Convolution", "FullyConnected", "MatMul")


def main(job: Job) -> None:
    """Quantize, export and evaluate."""
    import nncf
    import numpy as np
    import openvino as ov
    from nncf.quantization.advanced_parameters import QuantizationParameters

    core = ov.Core()
    model = ov.convert_model(job.inputs / "float.onnx")
    images = job.array("train")[:IMAGES]
    path = job.out / "quantized.xml"
    advanced = nncf.AdvancedQuantizationParameters()
    if job.bits != (8, 8) or not job.per_channel:
        advanced.weights_quantization_params = QuantizationParameters(
            num_bits=job.weight_bits, per_channel=job.per_channel
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
    """Count the layers that the compiled model computes in integers and in float."""
    counts: Counter[bool] = Counter()
    for operator in compiled.get_runtime_model().get_ordered_ops():
        told = {key: str(value.value) for key, value in operator.get_rt_info().items()}
        if told["layerType"] in LAYERS:
            counts[told["runtimePrecision"] in ("u8", "i8", "u4", "i4")] += 1
    return counts[True], counts[False]


run(main)
