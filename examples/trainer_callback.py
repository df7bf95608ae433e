"""A classifier trained sparse by your own transformers.Trainer: three lines are pst's.

python examples/trainer_callback.py --model DIR_OR_HUB_ID --data reviews.jsonl --output sparse
"""

import argparse
import tempfile

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from pst.callback import PSTCallback


def main() -> None:
    """JSON lines with ``sentence`` and a whole-number ``label`` in, a 2:4 model out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--data", required=True, help="JSON lines with sentence and label")
    parser.add_argument("--output", required=True, help="folder for the sparse model")
    parser.add_argument("--pattern", default="2:4", help="2:4, another N:M, or, with --sparsity, unstructured")
    parser.add_argument("--sparsity", type=float, help="fraction of zeros, where the pattern leaves it open")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over the rows")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = load_dataset("json", data_files=arguments.data, split="train")
    rows = rows.map(lambda row: tokenizer(row["sentence"], truncation=True, max_length=128), batched=True)
    labels = len(set(rows["label"]))
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=labels)

    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            scratch, num_train_epochs=arguments.epochs, per_device_train_batch_size=32, save_strategy="no",
            report_to="none",
        )  # fmt: skip
        pst = PSTCallback(model, pattern=arguments.pattern, sparsity=arguments.sparsity)
        trainer = Trainer(
            model, settings, train_dataset=rows, processing_class=tokenizer,
            callbacks=[pst], optimizers=(pst.optimizer, None),
        )  # fmt: skip
        trainer.train()
    pst.save(arguments.output, tokenizer)


if __name__ == "__main__":
    main()
