"""lm-evaluation-harness on the demo model, in this process and offline: how Python goes on.

pip install jaxinfer[eval]
python examples/lm_eval_local.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from jaxinfer import LLM
from jaxinfer.evaluation import evaluate

# The first choice is right. A choice begins with the space or bracket that follows the context.
QUESTIONS = [
    ("import os\nimport sys\n\n\nclass Error", ["(Exception):", "[0] = 1", " import"]),
    ("def __init__", ["(self, name):", "(name, self):", ":"]),
    ("for key, value in", [" self.items():", " self.items()", " self.item:"]),
    ("if isinstance(value, str", ["):", "]:", "):)"]),
    ("try:\n    import readline\nexcept", [" ImportError:", " KeyError:", " import:"]),
    ("with open(path, 'rb') as", [" f:", " 'rb':", " None:"]),
    ("def close(self):\n    self.file", [".close()", ".open()", " = open("]),
    ("raise", [" ValueError(", " 12", " def"]),
]
TASK = {
    "task": "python_completion",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": 0,
    "target_delimiter": "",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ],
}


def main() -> None:
    with tempfile.TemporaryDirectory() as name, LLM("demo", max_model_len=256) as llm:
        folder = Path(name)
        lines = [json.dumps({"context": text, "choices": choices}) for text, choices in QUESTIONS]
        (folder / "questions.jsonl").write_text("\n".join(lines))
        files = {"data_files": {"test": str(folder / "questions.jsonl")}, "cache_dir": name}
        # JSON is YAML too.
        (folder / "task.yaml").write_text(json.dumps({**TASK, "dataset_kwargs": files}))
        tasks = TaskManager(include_path=name, include_defaults=False)
        print(make_table(evaluate(llm, ["python_completion"], task_manager=tasks)))


if __name__ == "__main__":
    main()
