"""Fuzz target: files of prompts, and of problems with their answers."""

from pathlib import Path

import fuzz_values as values
from fuzz_bounds import Case, attempt
from fuzz_targets import Target
from hypothesis import strategies as st

from coe_megatron.cli.generate import read_prompts
from coe_megatron.convert.answers import file_questions
from coe_megatron.data.records import Templates

RECORDS = [
    {"query": "1 + 1?", "response": "It is 2. The answer is 2."},
    {"query": "How much?", "response": "#### $1,200.50"},
    {"query": "Which part?", "response": "The answer is -3/4 of it"},
    {"query": "e3?", "prompt": "r2 r1 e3", "answer": "e5", "group": "2 hops"},
]
TEMPLATES = Templates.of(["query : {query} response : {response}", "{prompt} {answer}"])


class Prompts(Target):
    """What generate.py reads with --file, and evaluate.py with --answers."""

    names = ("prompts.jsonl", "--file", "--answers")

    def prepare(self, folder: Path) -> None:
        self.path = folder / "prompts.jsonl"
        self.path.write_bytes(values.json_lines(RECORDS))

    def cases(self) -> st.SearchStrategy[Case]:
        contents = values.files([values.json_lines(RECORDS)], [RECORDS], [values.json_lines])
        return st.builds(Case, st.fixed_dictionaries({"prompts.jsonl": values.file_or_not(contents)}))

    def act(self, folder: Path, case: Case) -> list[str]:
        path = folder / "prompts.jsonl"
        refusals = attempt(lambda: read_prompts(path, None)) + attempt(lambda: read_prompts(path, "query"))
        return refusals + attempt(lambda: self._ask(path))

    @staticmethod
    def _ask(path: Path) -> None:
        for question in file_questions(path, TEMPLATES):
            assert question.answer and question.prompt and not question.prompt.endswith(" ")
