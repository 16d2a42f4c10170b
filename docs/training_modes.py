"""Write docs/training-modes.md from the lists of the tests: ``python -m docs.training_modes``."""

from __future__ import annotations

from pathlib import Path

from tests import modes, processes

PAGE = Path(__file__).with_name("training-modes.md")
HEAD = """# Training modes

`python -m docs.training_modes` writes this page from the lists that the tests use (`tests/modes.py`, `tests/processes.py`). Each row
is a training. `tests/test_training_modes.py` and `tests/test_processes.py` compare its numbers with those of a float64 loop in one
process: the gradient norm of every layer, the global norm and the loss agree within 1e-6. One row of the history is one optimizer
step.

## One process

| mode | what is recorded | when |
|---|---|---|
"""
TOGETHER = """
All of these are run a second time with the code for devices (below), with the same result.

### What belongs to a step

* **The loss of a row** is the sum of the losses of all backwards that reached parameters of this optimizer since their gradients were
  cleared (set to None, or to zero in place) or used in a step. A backward of another model belongs to no row, nor does one whose
  gradients you clear. The losses of several `monitor.loss` calls since the last step are added too.
* **With a closure**, the loss is what it returns, plus the losses of the backwards before it unless the closure clears their
  gradients. If the closure is evaluated several times, as in a line search, the first evaluation makes the row.
* **Gradients that you set yourself** (`torch.autograd.grad`, `torch.func`, gradient surgery, DP-SGD) have no loss unless you call
  `monitor.loss`. If a backward ran before, and gradwatch could not see that its gradients were cleared before yours took their
  place, the loss of that backward is recorded.
* **Before your own clip** means before the first clip since a backward, a step, or another change of the gradients. Only norms are
  stored, never gradients. If you replace the gradients by other tensors after the clip, the row holds the norms of those.
* **An optimizer that wraps another one** over the same parameters (SAM, Lookahead, a wrapper that accumulates or adds noise) leaves
  the row to the inner one: there is one row for each step that moves the weights, with the gradient that moves them. For SAM,
  this is the gradient at the perturbed weights; the first gradient, which is only used to find them, is in no row. If the inner
  optimizer does not step in 16 steps, the outer one makes the rows.
* Trainings in several threads of one process have separate rows: a backward is assigned by the parameters that it reaches.

## Several processes (`torchrun`)

Attach in each process. Each process measures its own part. One sum of {small} numbers, for a model of 100 layers and 8 processes,
combines them, so that norms, verdicts and decisions are identical to the bit in all processes. Losses are averaged. If NaN or Inf
came from one process alone, the incident names its rank; under FSDP, which mixes the gradients of all processes before they can be
seen, only for a loss. Only rank 0 draws, but a `Report` of your own is called in each process.

| mode | processes | what is recorded |
|---|---|---|
"""
TAIL = """
* FSDP2 with `CPUOffloadPolicy` needs an accelerator and was not tested.
* Call `detach()` in every process or in none; the others wait for a process that stops exchanging.
* From the first `DistributedDataParallel.join()` on, nothing is exchanged, since some processes may have no batch left. From then on,
  the rows of each process are its own, auto-clip does not act, and the summary says so.
* A gradient that is one summand of the whole (`Partial`, as of a sequence-parallel norm) is summed before it is measured, as the
  optimizer would do. This takes one more exchange for each such gradient.
* Under FSDP, parameters cannot have hooks. The order of layers within one backward is then that of the model, reversed.
* If only some of the processes attach, their numbers are their own, auto-clip does not act, and the summary says so. This is detected
  at the first step, within 30 seconds.
* If gradwatch fails in one process, it switches off in all of them at the same step, and training continues.
* All processes must make the same optimizer steps in the same order, because each step is one exchange. A step that a gradient scaler
  leaves out, in one process or in all, is exchanged as well.

### DeepSpeed

`gradwatch.attach(engine)` (or the model inside it) after `deepspeed.initialize`, in each process, is all that is needed; a Trainer or
Accelerate may call the engine. ZeRO reduces gradients into buffers of its own and clears `grad`, so the numbers are taken from there,
at the `step` of DeepSpeed's optimizer. `tests/frameworks/test_deepspeed.py` trains in two processes with gloo and holds each row
against DeepSpeed's own `safe_get_full_grad` and `safe_get_full_fp32_param`; norms agree within 1e-5. Nothing is gathered: the one
sum of each step is all that is sent.

| stage | gradients | weights | a step that is left out |
|---|---|---|---|
| 0, float32 | `grad` | float32 | counts in `skipped_steps`, and the schedule waits, as after an overflow |
| 0, bfloat16 | `grad` | bfloat16 | as above |
| 1, 2 | the fragments that each process holds | the optimizer's float32 copies | as above |
| 1, bfloat16 accumulated in float32 | whole, from the optimizer's buffers | the optimizer's float32 copies | as above |
| 3 | the parts that each process holds | the optimizer's float32 copies; of frozen layers, the parts | as above |

* The loss of a row is that of `engine.backward` without its division by accumulation: the mean over the backwards of a step.
* Norms are those before DeepSpeed's `gradient_clipping`. Auto-clip scales the gradients in DeepSpeed's buffers, before that: a
  `get_global_grad_norm()` of such a step is that of the clipped gradients.
* DeepSpeed waits for the norm of the gradients at each step itself, so rows are read at once there, on a device too.
* Which process made a gradient that is not finite is unknown at stages 1 to 3, where gradients of all processes are mixed before they
  can be seen; a loss that is not finite names its rank. Dead units are unknown at stages 2 and 3, and at 1 unless gradients are
  accumulated in float32. The operation that made a NaN is not looked for.
* What is attached before `deepspeed.initialize` misses the first step, and at stage 0 the engine does not count a step left out.
* With `offload_optimizer`, gradients and weights are measured on the host, but auto-clip is refused: DeepSpeed clips there by norms
  that it has taken before.
* Refused, with the reason: float16 and its loss scale, pipelines, tensor, expert and sequence parallelism,
  `round_robin_gradients`, Muon, ZenFlow and SuperOffload, and versions of DeepSpeed whose optimizers hold something else (0.19.8 was tested; on the CPU, not on a GPU).

### Deciding together

What is exchanged and what auto-clip does never depends on anything that only one process knows. What the others need to know is sent
with the row, in four of its numbers for each process.

* Settings (`rules` and their limits, `clip` and all of its settings, `every`, `budget`, the version) are compared at the first
  step. If they differ, each process says what differs and only watches: auto-clip does not act, and each process judges by its own
  settings. If `every`, `budget` or the version differ, the numbers are also those of each process alone.
* With `budget=`, the largest `every` that any process asks for is used in all of them, from the next row on. In distributed training
  there is no cheap check between rows. If an incident requires every step to be measured, this starts after the next row.
* A rule that fails in one process is switched off in all of them. A rule of your own may fail in the very row in which it would open
  an incident. Its values are therefore used one row later (eight on a device), when all processes know that it failed nowhere, and
  each row is judged.
* A clip of your own may fail in one process after it has clipped in another. The processes therefore exchange one more number
  wherever it may act: on the CPU while an explosion is open (or always, with `when="always"`), on a device in each step. If it has
  failed, no process makes the step, and gradwatch switches off in all of them.
* If a report or a run log fails, only its own process is affected.
* If auto-clip nevertheless decided differently in one process, for example because of a rule of your own that uses data of that
  process alone, the next row shows it. Each process says so, and auto-clip acts in none of them from then on.

## Gradients on a device

If gradients are on CUDA or another accelerator, no step reads a value on the host (sparse gradients and `forensics="wait"` aside). Rows
are written to a ring on the device and copied to pinned memory. Rules receive them when they have arrived, usually one or two steps later and at most 64; with several processes,
each reads a row exactly 8 steps later. Incidents name the true step. `monitor.incidents`, `monitor.verdict` and `monitor.summary()`
wait for pending rows (with several processes, only the end does).

Urgent decisions of auto-clip are made on the device, before any rule has seen the step. A step whose gradients are not finite is left
out. A step that surges is clipped (a layer at 100 times its usual norm while the loss is high, or at 500 times), and so is each step while
auto-clip is on.

| optimizer | clip by norm | clip by value | a step that is not finite |
|---|---|---|---|
| `fused=True` (Adam, AdamW, SGD, Adagrad) | done by the optimizer, no extra pass | one pass | left out completely: parameters and state unchanged |
| others | one pass | one pass | gradients set to zero: momentum and weight decay still act, and the summary says so |

Sums are in float64 there, so that squares neither overflow nor lose digits. NaN and Inf elements are not counted. Sparse gradients are
coalesced, which waits for the device. The loss is copied on its device when its backward ends, because a replayed CUDA graph
(`mode="reduce-overhead"`) overwrites it. Watching takes at most 1 % of the gradients' memory.

* **Several devices, or a part of the model on the CPU**: the model is measured as one, and rows are made on its first device that is
  not the CPU. To clip gradients on the CPU, auto-clip waits for its factor once it is armed; watching alone does not wait. Batch
  statistics on the CPU cannot be restored without waiting, so a step left out together with them is not counted as skipped. A model
  may move between devices, as a whole or in part.
* **CUDA graphs**: while a step is captured, gradwatch does nothing, and says so once. Replays run no Python, so only what is outside of
  the graph is seen: of a graph of forward and backward, the gradients but not the loss (hand it over with `monitor.loss`).
* **Metal** (`mps`) and some Intel GPUs (`xpu`) have no float64: norms above 1e19 are infinite there. Neither has been run; the stand-in
  below can refuse the operations that they lack.
* Any other device must offer torch's events, or `attach` refuses the model.

None of this has run on a real GPU yet: `pytest -m gpu` runs the tests for GPUs where there is one. It is verified without a GPU by tests
on meta tensors, where every read raises, by counts of reads, and on a stand-in for CUDA (`tests/device/`), which the tests compile where
there is `g++`: two devices whose memory the host cannot access, copies to pinned memory that arrive late, and waits that are counted or
raise. The stand-in has no CUDA kernels, no races between streams, no replays of graphs and no sparse tensors.

## Accuracy

On the CPU, float32 tensors of 32,768 elements and more are summed in pieces of at most 512, whatever their size and strides. The
norms are then within 1e-6 (at worst 5e-7, if all elements are equal). Smaller tensors use torch's own sum, which is within 1e-6 up to
1,024 elements, and beyond for ordinary gradients. If all elements of such a layer are equal, or one outweighs all others, it can be
off by 3e-5. Half precision is summed in float32, in the same pieces. If squares overflow or underflow float32, the layer is measured
again in float64, so that finite gradients near 1e20 have their true norm and are clipped in the right direction.

## Not supported

* Megatron-LM keeps gradients in buffers of its own, and so does DeepSpeed in the cases named above. `attach` says so and refuses;
  zeros are never reported.
* Several processes with a model that is neither DistributedDataParallel nor FSDP nor made of DTensors (gradients averaged by hand,
  pipeline stages): each process watches its own part alone, and the summary says so.
* Parameters whose norm torch cannot compute (nested, in float8, in a sparse layout other than COO, on the meta device together with
  others, of a class without norms, such as some quantised ones): their weights or gradients are left out, which is said once, by
  name. All other layers are watched, and no clip acts on what is left out.
* A clip of your own on a device, unless it has `apply_unread`.
* `ClipAGC` if processes hold parts of layers (FSDP, tensor parallelism), and there, clips by layer after a clip of your own.
* Auto-clip inside backward, where each parameter is updated before the global norm is known, and inside the line search of LBFGS. Both
  are watched; steps of LBFGS that are not finite are left out.
* Steps inside a CUDA graph: only what is outside of the graph is seen.
"""


def page() -> str:
    """Return the page in Markdown."""
    from gradwatch.measure.packed_row import size_of

    alone = "".join(f"| {mode.name} | {mode.recorded} | {mode.when} |\n" for mode in modes.MODES)
    together = "".join(f"| {mode.name} | {mode.processes} | {mode.recorded} |\n" for mode in processes.MODES)
    return HEAD + alone + TOGETHER.format(small=size_of(100, 8)) + together + TAIL


if __name__ == "__main__":
    PAGE.write_text(page())
