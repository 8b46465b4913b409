# SPDX-License-Identifier: Apache-2.0
"""Small tasks of each kind for lm-evaluation-harness, on local JSON files."""

import json
from pathlib import Path

import yaml

STEMS = (
    "Return True if the object is an instance of the class, or of a subclass thereof, and",
    "The function returns",
    "If the argument is not a valid type, a TypeError",
    "This module provides",
    "Changed in version 3.8: the parameter",
)
CHOICES = (("False otherwise.", "a list of strings.", "banana"), ("is raised.", "added.", "an interface to the files"))
TEXTS = (
    "Return a new list containing all items from the iterable in ascending order.",
    "The with statement is used to wrap the execution of a block with methods defined by a context manager. " * 12,
    "Open file and return a corresponding file object.",
)


def write_tasks(folder: Path) -> list[str]:
    """Writes the tasks and their documents; their names."""
    documents = {
        "choices": [
            {"question": stem, "choices": CHOICES[i % 2], "answer": i % len(CHOICES[i % 2])}
            for i, stem in enumerate(STEMS)
        ],
        "texts": [{"text": text} for text in TEXTS],
        "replies": [{"question": stem, "answer": "is raised"} for stem in STEMS[:3]],
        "raised": [{"question": stem, "answer": "is raised"} for stem in STEMS],
    }
    for name, rows in documents.items():
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    shared = {"dataset_path": "json", "test_split": "train"}
    tasks = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "raised": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "replies": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        data = {"dataset_kwargs": {"data_files": {"train": str(folder / f"{name}.json")}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": f"ktx_{name}", **shared, **data, **task}))
    return [f"ktx_{name}" for name in tasks]
