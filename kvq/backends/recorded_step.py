"""Training steps on PyTorch without the Python between their operations: recorded once, then repeated.

Keras runs PyTorch layer by layer, and each function and layer takes longer to call than most kernels take to run: on a GPU a step
took three times that of a loop written by hand. Here the operations of a step, forward, backward and optimizer, are written down
as PyTorch's dispatcher sees them. As code of `torch.fx`, without Python in between, they compute the same bits.

Written for one backend: to be imported inside a function, where that one runs.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

READS_VALUE = torch.ops.aten._local_scalar_dense.default
FRESH, FRESH_COPY = torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default
# Of what gives random numbers, and of what can give a shape that depends on values.
VARYING = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape}
# These read values past the dispatcher.
TO_THE_HOST = {Tensor.numpy, Tensor.tolist, Tensor.__array__}


class NotRepeatable(Exception):
    """A step that is not the same operations each time. The message is what varies in it."""


class RecordedStep:
    """`train_function` of a compiled `VQVAE`: a step of `fit`, to the bits of Keras' own.

    Its logs are the loss of the batch alone; the model's metrics hold the rest, without Keras' mean of the loss. The first batch
    of each shape is recorded. Where that fails, as with what draws random numbers, Keras takes the steps. What changes afterwards
    is seen where it is the value of a variable that the model or its optimizer owns; for all else `compile` and make another.

    Args:
        model: The model. Its optimizer decides in `judge` whether to `take` a step.
        note: Told where recording failed.
    """

    def __init__(self, model: keras.Model, note: Callable[[str], None] = lambda text: None):
        self.model = model
        self.note = note
        self._repeats: dict[Any, Callable[[Tensor], dict[str, Tensor]] | None] = {}

    def __call__(self, data: Sequence[Any]) -> dict[str, Tensor]:
        images = keras.ops.convert_to_tensor(keras.utils.unpack_x_y_sample_weight(data[0])[0])
        form = tuple(images.shape), images.dtype
        if form not in self._repeats:
            self._repeats[form] = self._record(images)
        repeat = self._repeats[form]
        return self.model.train_step((images,)) if repeat is None else repeat(images)

    @property
    def recorded(self) -> bool:
        """Whether every step so far was one that had been recorded."""
        return None not in self._repeats.values()

    def _record(self, images: Tensor) -> Callable[[Tensor], dict[str, Tensor]] | None:
        """A step on such images, or None if it cannot be repeated. Nothing of the model has changed afterwards."""
        model, optimizer = self.model, self.model.optimizer
        weights = model.trainable_weights
        optimizer.build(weights)
        state = [variable.value for variable in (*model.variables, *model.metrics_variables, *optimizer.variables)]
        before = [tensor.detach().clone() for tensor in state]
        learns: list[Any] = []

        def compute(images: Tensor) -> list[Tensor]:
            loss = model.compute_loss(x=images, y_pred=model(images, training=True))
            found = torch.autograd.grad(optimizer.scale_loss(loss), [w.value for w in weights], allow_unused=True)
            pairs = [(weight, gradient) for weight, gradient in zip(weights, found, strict=True) if gradient is not None]
            # In the layout of its weight, as `backward` leaves it: sums over it add in that order.
            learns[:], gradients = zip(*((weight, gradient.contiguous()) for weight, gradient in pairs), strict=True)
            with torch.no_grad():
                return [optimizer.judge(gradients), loss.detach(), *gradients]

        @torch.no_grad()
        def update(*gradients: Tensor) -> list[Tensor]:
            optimizer.take(gradients, learns)
            return []

        try:
            repeat, (_, _, *gradients) = record(compute, [images], state)
            repeat_update, _ = record(update, gradients, state)
        except Exception as error:  # whatever it was: if the model is at fault, Keras' own step will tell
            self.note(
                "Keras takes the steps, layer by layer, which on a GPU takes several times as long as recorded ones. Why: "
                f"{type(error).__name__}: {_in_a_line(error)}"
            )
            return None
        finally:
            with torch.no_grad():
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)

        @torch.no_grad()
        def step(images: Tensor) -> dict[str, Tensor]:
            taken, loss, *gradients = repeat(images)
            if taken:
                repeat_update(*gradients)
            return {"loss": loss}

        return step


def record(
    function: Callable[..., list[Tensor]], inputs: Sequence[Tensor], state: Sequence[Tensor]
) -> tuple[Callable[..., list[Tensor]], list[Tensor]]:
    """Calls a function, and makes another of the operations that it executed, which does not know its Python.

    Args:
        function: Of tensors, to a list of tensors.
        inputs: What it is called with.
        state: The tensors that it reads or writes beside them, in place. All others from outside count as constants.

    Returns:
        The other function, to be called without gradients and with inputs of the same shapes; and the result of this call.

    Raises:
        NotRepeatable: If it drew random numbers, asked for a value that is not the same each time, or wrote to a constant.
    """
    with _Recorder(inputs, state) as recorder, _OnTheDevice():
        result = function(*inputs)
    return recorder.repeat(result), result


class _OnTheDevice(TorchFunctionMode):
    """Refuses what reads values without the dispatcher's knowledge."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function in TO_THE_HOST:
            raise NotRepeatable(f"Tensor.{function.__name__} reads values")
        return function(*arguments, **(keywords or {}))


class _Recorder(TorchDispatchMode):
    """Writes down what passes the dispatcher, below autograd: the operations of the backward pass are among it."""

    def __init__(self, inputs: Sequence[Tensor], state: Sequence[Tensor]):
        super().__init__()
        self.graph = fx.Graph()
        self.nodes = WeakTensorKeyDictionary()
        for number, tensor in enumerate(inputs):
            self.nodes[tensor] = self.graph.placeholder(f"given_{number}")
        self.state_storages = {_storage(tensor) for tensor in state}
        self.kept: dict[fx.Node, Tensor] = {}  # what is used and not made here: the state, and constants
        # Numbers that are the same each time, as of `torch.tensor(2.0)`, and those that are computed of them.
        self.numbers: dict[fx.Node, Tensor] = {}
        self.written: set[int] = set()  # storages

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if not VARYING.isdisjoint(function.tags):
            raise NotRepeatable(f"{function} is not the same each time")
        used = _tensors((arguments, keywords))
        for tensor in used:
            if tensor not in self.nodes:
                self.nodes[tensor] = self._keep(tensor)
                if _storage(tensor) not in self.state_storages:
                    self._note_number(tensor)
        is_constant = all(self._is_number(tensor) for tensor in used)
        if function is READS_VALUE:
            if not is_constant:
                raise NotRepeatable("a branch or a number of Python's depends on a tensor's value")
            return function(*arguments, **keywords)
        written = {_storage(tensor) for tensor in _tensors(_written(function, arguments, keywords))}
        if written & {_storage(tensor) for tensor in self.kept.values()} - self.state_storages:
            raise NotRepeatable(f"{function} writes to a tensor that the model does not own")
        self.written |= written

        if function is FRESH:
            function = FRESH_COPY  # so that what writes to it leaves the kept one
        node = self.graph.call_function(function, *tree_map_only(Tensor, self.nodes.__getitem__, (arguments, keywords)))
        result = function(*arguments, **keywords)
        if isinstance(result, Tensor):
            self.nodes[result] = node
            if is_constant and not function._schema.is_mutable:
                self._note_number(result)
        elif isinstance(result, tuple | list):
            for position, part in enumerate(result):
                if isinstance(part, Tensor):
                    self.nodes[part] = self.graph.call_function(operator.getitem, (node, position))
        elif result is not None:
            raise NotRepeatable(f"{function} gives Python a value")
        return result

    def repeat(self, result: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
        """What was written down, as a function of the inputs that returns what was this result."""
        graph = self.graph
        graph.output([self.nodes[tensor] for tensor in result])
        for node, number in list(self.numbers.items()):
            # A number made anew each time would be copied to the GPU, which waits for all that it was asked to do before.
            if node not in self.kept and self._is_number(number):
                with graph.inserting_before(node):
                    node.replace_all_uses_with(self._keep(number))
        graph.eliminate_dead_code()
        for node in self.kept:
            if not node.users:
                graph.erase_node(node)
        kept = [self.kept[node] for node in graph.nodes if node in self.kept]
        code = fx.GraphModule(torch.nn.Module(), graph).forward
        return lambda *inputs: code(*inputs, *kept)

    def _keep(self, tensor: Tensor) -> fx.Node:
        node = self.graph.placeholder(f"kept_{len(self.kept)}")
        self.kept[node] = tensor
        return node

    def _note_number(self, tensor: Tensor) -> None:
        if tensor.numel() == 1:
            self.numbers[self.nodes[tensor]] = tensor
            self.written.discard(_storage(tensor))  # which can be that of a tensor that is no more

    def _is_number(self, tensor: Tensor) -> bool:
        return self.nodes[tensor] in self.numbers and _storage(tensor) not in self.written


def _in_a_line(error: Exception) -> str:
    """What Keras says about the layer, and the message itself, which it prints in bold below that."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).replace("\x1b[1m", "").replace("\x1b[0m", "")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _written(function: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> list[Any]:
    """Those of the arguments that the function writes to."""
    if not function._schema.is_mutable:
        return []
    parameters = function._schema.arguments
    given = [*zip(parameters, arguments, strict=False), *((each, keywords.get(each.name)) for each in parameters)]
    return [value for parameter, value in given if parameter.alias_info is not None and parameter.alias_info.is_write]
