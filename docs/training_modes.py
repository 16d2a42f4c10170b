"""Write docs/training-modes.md from the tests' own lists: ``python -m docs.training_modes``."""

from __future__ import annotations

from pathlib import Path

from tests import modes, processes

PAGE = Path(__file__).with_name("training-modes.md")
HEAD = """# Training modes

Written by `python -m docs.training_modes` from the lists that the tests walk over (`tests/modes.py`, `tests/processes.py`).
Each row is a training: `tests/test_training_modes.py` and `tests/test_processes.py` compare its numbers with a loop in
float64 in one process; every layer's gradient norm, the global norm and the loss agree within 1e-6. One row of the history
is one optimizer step.

## One process

| mode | what is recorded | when |
|---|---|---|
"""
TOGETHER = """
All of these are run a second time on the path for devices (below), with the same result.

### What belongs to a step

* **The loss of a row** is the sum of the losses of all backwards that reached parameters of this optimizer since their
  gradients were cleared (None, or zero in place) or stepped with. A backward of another model belongs to no row, nor does
  one whose gradients you clear. The losses of several `monitor.loss` calls add up likewise, from one step to the next.
* **With a closure** the loss is what it returns, and the losses of the backwards before it unless the closure clears their
  gradients. A line search evaluates several times: its first evaluation is the row.
* **Gradients that you put into place yourself** (`torch.autograd.grad`, `torch.func`, gradient surgery, DP-SGD) have no loss
  unless you call `monitor.loss`. Where a backward ran before, and gradwatch could not see its gradients cleared before yours
  took their place, that backward's loss is recorded.
* **Before your own clip** means before the first one since a backward, a step, or another change of the gradients. Only
  norms are kept, never gradients. If you put other tensors in their place after the clip, the row holds the norms of those.
* **An optimizer around another one** over the same parameters (SAM, Lookahead, a wrapper that accumulates or adds noise)
  leaves the row to the one inside: one row for each step that moves the weights, with the gradient that moves them. For SAM
  that is the gradient at the perturbed weights; the first gradient, which only finds them, is in no row. If the one inside
  does not step in 16 steps, the outer one makes the rows.
* Trainings on several threads of one process keep their rows apart: a backward is followed to the parameters it leads to.

## Several processes (`torchrun`)

Attach in each process. Each measures its own part; one sum of {small} numbers for a model of 100 layers and 8 processes
makes them the numbers of the whole, so that norms, verdicts and decisions are the same to the bit in all of them. Losses
are averaged. Where NaN or Inf came from one process alone, the incident names its rank. Only rank 0 draws, but a `Report`
of your own is called in each process.

| mode | processes | what is recorded |
|---|---|---|
"""
TAIL = """
* FSDP2 with `CPUOffloadPolicy` needs an accelerator and was not run.
* Call `detach()` in every process or in none; a process that stops exchanging leaves the others waiting.
* From the first `DistributedDataParallel.join()` on nothing is exchanged, since some processes may have no batch left: each
  process's rows are its own then, auto-clip does not act, and the summary says so.
* A gradient that is only a summand of the whole (`Partial`, as of a sequence-parallel norm) is summed before it is measured,
  as the optimizer would do it; that is one more exchange for each.
* Under FSDP parameters bear no hooks. There the order of layers within one backward is that of the model, reversed.
* If only some of the processes attach, their numbers are their own, auto-clip does not act, and the summary says so. It
  is found out at the first step, within 30 seconds.
* If gradwatch fails in one process, it switches off in all of them at the same step, and training goes on.
* Each process must make the same optimizer steps in the same order: each of them is one exchange. A step that a gradient
  scaler leaves out, in one process or in all, is exchanged as well.

### Deciding together

Nothing that one process alone knows decides what is exchanged or what auto-clip does. What the others need to know of it
travels with the row: four of its numbers are for that, for each process.

* Settings (`rules` and their thresholds, `clip` and all that belongs to it, `every`, `budget`, the version) are compared at
  the first step. Where they differ each process says what differs, and only watches: auto-clip does not act. Where `every`,
  `budget` or the version differ, numbers are those of each process alone as well.
* With `budget=` the largest `every` that a process wishes counts in all of them, from the next row on. Between rows there is no
  sentinel in a training of several processes. An incident that calls for each step to be measured does so once the next
  row has told of it.
* A rule that fails in one process is switched off in all of them. One of your own may fail, or not, in the very row in which
  it would open an incident: so its values count one row later (on a device eight), when all know that it failed nowhere, and
  each row is judged.
* A clip of your own may fail in one process after it has clipped in another. So the processes ask each other once more, by one
  number, wherever it may act: on the CPU while an explosion is open (or always, for `when="always"`), on a device in
  each step. If it has failed, nobody makes that step, and gradwatch switches off in all of them.
* A report or a run log that fails is that process's own business.
* Should auto-clip have decided otherwise in one process all the same, as by a rule of your own that looks at what that
  process alone knows, the next row shows it: each process says so, and auto-clip acts in none of them from then on.

## Gradients on a device

Where gradients live on CUDA or another accelerator, no step reads a value on the host. Rows are written to a ring on the
device and copied to pinned memory; rules see them when they have arrived, usually one or two steps later, at most 64; with
several processes each reads a row exactly 8 steps later. Incidents carry the true step. `monitor.incidents`,
`monitor.verdict` and `monitor.summary()` wait for the rows under way (of several processes only the end does).

What must be done at once is decided on the device: a step whose gradients are not finite is left out, and one whose global
norm is 100 times its typical value, or 10 times beside a loss that suffers, is clipped before any rule has seen it. While an
incident is open each step is clipped.

| optimizer | clip by norm | clip by value | a step that is not finite |
|---|---|---|---|
| `fused=True` (Adam, AdamW, SGD, Adagrad) | left to the optimizer, no extra pass | one pass | left out for real: parameters and state untouched |
| others | one pass | one pass | gradients set to zero: momentum and weight decay still act, and the summary says so |

Sums are in float64 there, so that squares neither overflow nor lose digits. Counts of NaN and Inf elements are not taken.
Sparse gradients are coalesced, which waits for the device. The loss is copied on its device when its backward ends, because a
replayed CUDA graph (`mode="reduce-overhead"`) overwrites it. Watching takes at most a hundredth of the gradients' memory more.

* **Several devices, or a part on the CPU**: the model is measured as one, and rows are made on its first device that is not
  the CPU. For the gradients on the CPU auto-clip's factor has to be waited for, once it is armed; watching alone waits for
  nothing there either. Batch statistics on the CPU cannot be restored without waiting: a step that is left out beside them is
  not counted as skipped. A model may move between devices, as a whole or in part.
* **CUDA graphs**: while a step is captured gradwatch does nothing, and says so once. Replays run no Python, so that only what
  is outside of the graph is seen: of a graph of forward and backward the gradients, but not the loss (hand it over with
  `monitor.loss`).
* **Metal** (`mps`) has no float64, nor have some Intel GPUs (`xpu`): norms above 1e19 read as infinite there. Neither has been
  run; the stand-in below can refuse what they lack.
* Any other device must offer events of torch, or `attach` refuses the model.

None of this has run on a real GPU yet: `pytest -m gpu` does so where there is one. Without, it is tested on meta tensors, where
every read raises, and on a stand-in for CUDA (`tests/device/`), which is compiled by the tests where there is `g++`: two devices
whose memory the host cannot touch, copies to pinned memory that arrive late, and waits that are counted or raise. What a
stand-in does not have: CUDA's own kernels, streams that overtake each other, replays of graphs, sparse tensors.

## Accuracy

On CPU, float32 sums over 32,768 elements and more go in pieces of at most 512, whatever the size and the strides, which keeps
them within 1e-6 (at worst 5e-7, where all elements are equal). Below that torch's own sum is used: within 1e-6 up to 1,024
elements and for ordinary gradients beyond; where all elements of such a layer are equal, or one outweighs all others, it can
be off by 1e-5. Half precision is summed in float32, by the same pieces. Where squares overflow or underflow float32, the layer is measured again in float64, so
that finite gradients near 1e20 get their true norm and are clipped in the right direction.

## Not supported

* DeepSpeed and Megatron-LM keep gradients in buffers of their own. `attach` says so and refuses; zeros are never reported.
* Several processes in which the model is neither DistributedDataParallel nor FSDP nor made of DTensors (gradients averaged
  by hand, pipeline stages): each process watches its own part alone, and the summary says so.
* Parameters whose norm torch does not take (nested, in float8, in a sparse layout other than COO, on the meta device beside
  others, of a class without norms, as some quantised ones): their weights, or their gradients, are left out, which is said
  once by name; all other layers are watched, and no clip acts on what is left out.
* A clip of your own on a device, unless it has `apply_unread`.
* `ClipAGC` where processes hold parts of layers (FSDP, tensor parallelism), and the clips by layer there after a clip of your
  own.
* Auto-clip inside backward, where each parameter is updated before the global norm is known, and inside LBFGS's line
  search: both are watched; of LBFGS, steps that are not finite are left out.
* Steps inside a CUDA graph: only what is outside of the graph is seen.
"""


def page() -> str:
    """Return the page."""
    from gradwatch.measure.packed_row import size_of

    alone = "".join(f"| {mode.name} | {mode.recorded} | {mode.when} |\n" for mode in modes.MODES)
    together = "".join(f"| {mode.name} | {mode.processes} | {mode.recorded} |\n" for mode in processes.MODES)
    return HEAD + alone + TOGETHER.format(small=size_of(100, 8)) + together + TAIL


if __name__ == "__main__":
    PAGE.write_text(page())
