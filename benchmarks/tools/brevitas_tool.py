"""Brevitas, following its example ``imagenet_classification/ptq`` (``ptq_evaluate.py``).

* ``preprocess_for_quantize`` with 20 iterations of graph equalization and merged biases, then
  the example's ``quantize_model`` with the target backend ``fx``, float scales, 32-bit biases,
  activation statistics at the percentile 99.999 and asymmetric activations (as frequent as
  symmetric ones in its table of best configurations), then ``calibrate`` and
  ``apply_bias_correction``.
* The first 100 images: its simulation takes most of a second per image, three times.
* ``ptq``: nothing else. ``gptq``: ``apply_gptq`` before the bias correction, as in the 4-bit rows
  of its table of best configurations, with 40 images because each layer takes a pass over them.
* ``relu6_to_relu`` is off: its default replaces ReLU6 by ReLU, which changes the float function
  (agreement of the network with itself: 68 %). ReLU6 becomes a quantized ReLU6, a subclass, since
  its own map quantizes ReLU6 as ReLU. Equalization skips ReLU6.
* Its learned rounding needs the target backend ``layerwise``, which leaves additions in float. That
  is no network for an integer runtime, so it is not compared.
* Export: ``export_onnx_qcdq``, as in the example. The simulation is evaluated first, because a
  failed export changes the network. The export fails with "QuantTensor not valid" where a bias is
  millions of its steps: float32 represents those to a quarter of a step, and the export's check
  accepts a fifth.
"""

from __future__ import annotations

from common import Job, run

BATCH = 20
IMAGES = 100
GPTQ_IMAGES = 40


def main(job: Job) -> None:
    """Quantize, export and evaluate."""
    import torch
    from brevitas.export import export_onnx_qcdq
    from brevitas.export.inference import quant_inference_mode
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq import ptq_common as example
    from plain import batches, logits, network

    model = network(job)
    images = [(batch, None) for batch in batches(job.array("train")[:IMAGES], BATCH)]
    replace_relu6(example)
    path = job.out / "quantized.onnx"
    with job.timed():
        model = preprocess_for_quantize(
            model, relu6_to_relu=False, equalize_iters=20, equalize_merge_bias=True
        )
        quantized = example.quantize_model(
            model,
            backend="fx",
            weight_bit_width=job.weight_bits,
            act_bit_width=job.activation_bits,
            bias_bit_width=32,
            weight_quant_granularity="per_channel" if job.per_channel else "per_tensor",
            act_quant_percentile=99.999,
            act_quant_type="asym",
            scale_factor_type="float_scale",
            quant_format="int",
        )
        quantized.eval()
        with torch.no_grad():
            quantized(images[0][0])
        example.calibrate(images, quantized)
        if job.recipe == "gptq":
            example.apply_gptq(images[: GPTQ_IMAGES // BATCH], quantized, create_weight_orig=True)
        example.apply_bias_correction(images, quantized)
        with torch.no_grad(), quant_inference_mode(quantized):
            quantized(images[0][0])
    job.logits(logits(quantized, job.array("val")))
    with job.export(path), torch.no_grad():
        export_onnx_qcdq(
            quantized,
            images[0][0][:1],
            str(path),
            opset_version=17,
            dynamo=False,
            input_names=["input"],
        )
    job.note(images=IMAGES)
    job.finish("brevitas", "torch", "timm", "onnx")


def replace_relu6(example) -> None:
    """Quantize ReLU6 as ReLU6."""
    import brevitas.nn as qnn
    import torch

    class QuantReLU6(qnn.QuantReLU):
        def forward(self, images):
            return super().forward(torch.clamp(images, max=6.0))

    original = example.create_quant_maps

    def with_relu6(*given, **options):
        layers, layerwise, acts, identities = original(*given, **options)
        acts = {**acts, torch.nn.ReLU6: (QuantReLU6, acts[torch.nn.ReLU][1])}
        return layers, layerwise, acts, identities

    example.create_quant_maps = with_relu6


run(main)
