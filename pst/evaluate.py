"""The model's predictions and the task's metrics, during training."""

import numpy as np
import torch
from torch import nn

from pst import metrics
from pst.batches import Encoded
from pst.distributed import Processes
from pst.materialize import materialized
from pst.progress import progress


@torch.inference_mode()
def predict(
    model: nn.Module, encoded: Encoded, *, batch_size: int, device: torch.device, processes: Processes | None = None
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """Logits of every row in order, (rows, labels) float32, of which each process computes its share.

    Masked weights are made once, not once a batch.
    """
    processes = processes or Processes()
    training = model.training
    model.eval()
    order = processes.share(np.argsort(encoded.lengths(), kind="stable").tolist())
    logits: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {}
    with materialized(model), progress("evaluate", len(order)) as advance:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = {name: value.to(device) for name, value in encoded.batch(rows).items() if name != "labels"}
            output = model(**batch).logits.float().cpu().numpy()
            logits.update(zip(rows, output, strict=True))
            advance(len(rows))
    model.train(training)
    for share in processes.gather(logits):
        logits |= share
    return np.stack([logits[row] for row in range(len(encoded))])


def evaluate(
    model: nn.Module,
    encoded: Encoded,
    *,
    task: str,
    batch_size: int,
    device: torch.device,
    processes: Processes | None = None,
) -> dict[str, float]:
    """The metrics of pst/metrics.py for *task* (classification or regression), as fractions."""
    logits = predict(model, encoded, batch_size=batch_size, device=device, processes=processes)
    predictions = logits[:, 0] if task == "regression" else logits.argmax(-1)
    return metrics.compute(task, predictions, encoded.labels.numpy())
