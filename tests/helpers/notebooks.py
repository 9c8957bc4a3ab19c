"""Runs the cells of a notebook in a real Jupyter kernel."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from helpers.commands import clean_environment


@dataclass(frozen=True)
class CellOutput:
    """What a notebook shows under a cell."""

    out: str
    err: str
    result: str
    error: tuple[str, str]
    shown: str
    page: str = ""  # what is displayed and updated, as it was last

    @classmethod
    def of(cls, cell: Any) -> CellOutput:
        streams = {"stdout": "", "stderr": ""}
        result, error, shown, page = "", ("", ""), "", ""
        for output in cell.outputs:
            if output.output_type == "stream":
                streams[output.name] += output.text
            elif output.output_type == "error":
                error, shown = (output.ename, output.evalue), "\n".join(output.traceback)
            elif output.output_type == "display_data":
                page += output.data["text/html"]
            else:
                result += output.data["text/plain"]
        return cls(streams["stdout"], streams["stderr"], result, error, shown, page)


class _Interrupting(NotebookClient):
    """Interrupts the kernel once, as the notebook's button does, when it has printed the words `mark`."""

    mark = "now interrupt me"
    _interrupt: asyncio.Future[Any] | None = None

    def output(self, outs: Any, msg: Any, display_id: Any, cell_index: Any) -> Any:
        if self._interrupt is None and self.mark in msg["content"].get("text", ""):
            self._interrupt = asyncio.ensure_future(self.km.interrupt_kernel())
        return super().output(outs, msg, display_id, cell_index)


def run_notebook(cells: list[str], folder: Path, timeout: int = 200) -> list[CellOutput]:
    """Runs a notebook's cells to the last one, also after errors, and returns what each cell shows.

    Args:
        cells: their code; one that prints `now interrupt me` is interrupted then.
        folder: where the kernel runs.
        timeout: seconds for one cell.
    """
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = _Interrupting(
        notebook, timeout=timeout, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": folder}}
    )
    client.create_kernel_manager()
    client.km.connection_file = str(folder / "kernel.json")
    environment = clean_environment(IPYTHONDIR=str(folder / "ipython"))
    environment.pop("PYTHONUNBUFFERED", None)  # which no notebook has
    client.execute(env=environment)
    return [CellOutput.of(cell) for cell in notebook.cells]
