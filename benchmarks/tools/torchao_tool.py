"""torchao PT2E, after its tutorial "PyTorch 2 Export Quantization with X86 Backend".

* ``torch.export``, ``prepare_pt2e`` with X86InductorQuantizer and its default static recipe (uint8
  activations, int8 weights with one scale per filter), calibration on 500 images in batches of 20,
  ``convert_pt2e``. Batch norms are folded by ``prepare_pt2e``.
* One threshold per tensor and other bits: its recipe has no option for them, so they are refused,
  in the words of the tool's signature.
* What ships is compiled by torch itself (Inductor); there is no file for another runtime, so only
  the simulation, the quantize and dequantize operators as they stand, is judged.
"""

from __future__ import annotations

import inspect

from common import Job, Refused, run

BATCH = 20


def main(job: Job) -> None:
    """Quantize, write, judge."""
    import torch
    from plain import batches, logits, network
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    if job.bits != (8, 8) or not job.vector:
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
