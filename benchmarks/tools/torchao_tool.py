"""torchao PT2E, following "PyTorch 2 Export Quantization with X86 Backend".

* ``torch.export``, ``prepare_pt2e`` (which folds batch norms) with X86InductorQuantizer and its
  default static recipe (uint8 activations, per-channel int8 weights), calibration on 500 images in
  batches of 20, ``convert_pt2e``.
* Per-tensor weights and other bits are refused: the recipe has no option for them. The refusal
  quotes the tool's signature.
* torch compiles the result itself (Inductor); there is no file for another runtime, so only the
  simulation, with separate quantize and dequantize operators, is evaluated.
"""

from __future__ import annotations

import inspect

from common import Job, Refused, run

BATCH = 20


def main(job: Job) -> None:
    """Quantize, export and evaluate."""
    import torch
    from plain import batches, logits, network
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    if job.bits != (8, 8) or not job.per_channel:
        signature = inspect.signature(get_default_x86_inductor_quantization_config)
        raise Refused(
            "no option for it: get_default_x86_inductor_quantization_config("
            f"{', '.join(signature.parameters)})"
        )
    model = network(job)
    images = batches(job.array("train"), BATCH)
    with job.timed():
        exported = torch.export.export(model, (images[0],)).module()
        quantizer = X86InductorQuantizer()
        quantizer.set_global(get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(exported, quantizer)
        with torch.no_grad():
            for batch in images:
                prepared(batch)
        converted = convert_pt2e(prepared)
        program = torch.export.export(converted, (images[0],))
        torch.export.save(program, job.out / "quantized.pt2")
    job.logits(logits(converted, job.array("val")))
    job.note(images=len(images) * BATCH)
    job.finish("torchao", "torch", "timm")


run(main)
