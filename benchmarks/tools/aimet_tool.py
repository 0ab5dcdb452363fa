"""AIMET (aimet-torch), following its user guide "Post Training Quantization".

* All recipes: ``equalize_model`` (folds batch norms, cross-layer equalization) first, as the guide
  recommends (it reports that it skips conv-ReLU6-conv), then ``QuantizationSimModel`` with the
  scheme ``min_max`` (its default) and ``compute_encodings`` on 500 images. Per channel: its file
  ``default_config_per_channel.json``; per tensor: ``default_config.json`` without its per-channel
  entries.
* ``minmax``: nothing else.
* ``seqmse``: ``apply_seq_mse`` with its 20 candidates on 100 images, then ``compute_encodings``. It
  silently skips weights of more than 4 bits; those cells are refused here.
* ``adaround``: ``Adaround.apply_adaround`` on 100 images in batches of 20, with its weight
  encodings frozen in the simulation and 200 iterations per layer. The default of 10,000 (15,000
  below 8 bits) takes most of a day on one core; with 500 images, 1800 s were not enough for Lite0.
* It puts no activation into one group with a depthwise convolution, so a quantizer precedes the
  ReLU6 of each. That is its design; its cost was not measured separately.
* Export: ``aimet_torch.onnx.export``, with quantize and dequantize operators. Where it fails, only
  the simulation is evaluated.
"""

from __future__ import annotations

import json
from pathlib import Path

from common import Job, Refused, run

BATCH = 20
SEQMSE_IMAGES = 100
ADAROUND_IMAGES = 100
ITERATIONS = 200


def main(job: Job) -> None:
    """Quantize, export and evaluate."""
    import aimet_torch
    import torch
    from aimet_torch import onnx as aimet_onnx
    from aimet_torch._base.seq_mse import SUPPORTED_PARAM_BW
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.cross_layer_equalization import equalize_model
    from aimet_torch.quantsim import QuantizationSimModel
    from aimet_torch.seq_mse import apply_seq_mse
    from plain import batches, logits, network

    if job.recipe == "seqmse" and job.weight_bits > SUPPORTED_PARAM_BW:
        raise Refused(f"apply_seq_mse passes over weights of more than {SUPPORTED_PARAM_BW} bits")
    model = network(job).requires_grad_(True)
    images = batches(job.array("train"), BATCH)
    example = images[0][:1]
    config = configuration(job, Path(aimet_torch.__file__).parent)
    path = job.out / "quantized.onnx"
    with job.timed():
        equalize_model(model, dummy_input=example)
        if job.recipe == "adaround":
            model = Adaround.apply_adaround(
                model,
                example,
                AdaroundParameters(
                    images, ADAROUND_IMAGES // BATCH, default_num_iterations=ITERATIONS
                ),
                path=str(job.out),
                filename_prefix="adaround",
                default_param_bw=job.weight_bits,
                default_quant_scheme=QuantScheme.min_max,
                default_config_file=config,
            )
        sim = QuantizationSimModel(
            model,
            example,
            quant_scheme=QuantScheme.min_max,
            default_output_bw=job.activation_bits,
            default_param_bw=job.weight_bits,
            config_file=config,
        )
        if job.recipe == "adaround":
            sim.set_and_freeze_param_encodings(str(job.out / "adaround.encodings"))
        if job.recipe == "seqmse":
            apply_seq_mse(sim, images[: SEQMSE_IMAGES // BATCH], num_candidates=20)

        def forward(network: torch.nn.Module) -> None:
            with torch.no_grad():
                for batch in images:
                    network(batch)

        sim.compute_encodings(forward)
    job.logits(logits(sim.model, job.array("val")))
    with job.export(path):
        aimet_onnx.export(
            sim,
            (example,),
            str(path),
            input_names=["input"],
            output_names=["logits"],
            opset_version=21 if min(job.bits) < 8 else 17,
            dynamo=False,
        )
    job.note(images=len(images) * BATCH)
    job.finish("aimet-torch", "torch", "timm", "onnx")


def configuration(job: Job, package: Path) -> str:
    """The tool's file of defaults, with or without a threshold for each channel."""
    folder = package / "common" / "quantsim_config"
    if job.per_channel:
        return str(folder / "default_config_per_channel.json")
    config = json.loads((folder / "default_config.json").read_text())
    config["defaults"]["per_channel_quantization"] = "False"
    for kind in config.get("op_type", {}).values():
        kind.pop("per_channel_quantization", None)
    path = job.out / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


run(main)
