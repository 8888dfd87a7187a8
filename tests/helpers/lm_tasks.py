"""Tasks of lm-evaluation-harness over a file of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""


ROWS: list[dict[str, Any]] = [
    {"question": "the cat sat on the", "choices": [" mat", " dog"], "answer": 0},
    {"question": "the dog ran to the", "choices": [" sea", " house now"], "answer": 1},
    {"question": "a mat is", "choices": [" a", " the", " no"], "answer": 2},
]


def local_tasks(folder: Path) -> Path:
    """Two tasks of the harness over a file of ours, with no network."""
    folder.mkdir(exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.replace("FILE", str(data)))
    return folder
