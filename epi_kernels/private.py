"""What the package uses of torch that torch promises nobody: private names, and behaviour that is not documented.

`tests/test_private_torch.py` compares the names with the code, and looks for each of them in the torch that runs.
DeepSpeed's are not here: all that the package knows of DeepSpeed is in `epi_kernels.isolation.deepspeed`.
"""

from typing import NamedTuple

OLDEST = "2.9"  # the oldest torch that the package supports


class Private(NamedTuple):
    """A private name of torch."""

    name: str
    where: str  # the module or class that has it, to be imported; or what object has it, in words
    reason: str  # why the package uses it and no public name
    without: str  # what happens in the package where torch does not have it
    since: str = OLDEST  # the oldest torch in which the package needs it under this name
    older: str = ""  # the name that an older torch has instead, which the package takes too


class Behaviour(NamedTuple):
    """What torch does, and does not document."""

    what: str
    reason: str  # why the package relies on it
    without: str  # what happens in the package where torch does otherwise


NAMES = (
    # Optimizers
    Private(
        name="_accelerator_graph_capture_health_check",
        where="torch.optim.Optimizer",
        reason="It raises torch's error, and its warning, where a step is captured and capturable does not fit.",
        without="The package cannot be imported.",
        since="2.11",
        older="_cuda_graph_capture_health_check",
    ),
    Private(
        name="_device_dtype_check_for_fused",
        where="torch.optim.optimizer",
        reason="fused=True refuses the parameters that torch's refuses, with its error.",
        without="The package cannot be imported.",
    ),
    Private(
        name="_get_capturable_supported_devices",
        where="torch.optim.optimizer",
        reason="capturable=True refuses the devices that torch's refuses, and names the others.",
        without="The package cannot be imported.",
    ),
    Private(
        name="_step_supports_amp_scaling",
        where="an AdamW with fused=True",
        reason="torch.amp.GradScaler asks for it: where it is True, the step unscales the gradients and skips itself.",
        without="A scaler unscales the gradients itself, and waits for the device before each step.",
    ),
    Private(
        name="_optimizer_state_dict_pre_hooks",
        where="an Optimizer",
        reason="IsolatedOptimizer calls the hooks of its state_dict itself: the base's state is not what it saves.",
        without="state_dict() of IsolatedOptimizer raises AttributeError.",
    ),
    Private(
        name="_optimizer_state_dict_post_hooks",
        where="an Optimizer",
        reason="As the hooks before it.",
        without="state_dict() of IsolatedOptimizer raises AttributeError.",
    ),
    Private(
        name="_optimizer_load_state_dict_pre_hooks",
        where="an Optimizer",
        reason="IsolatedOptimizer calls the hooks of its load_state_dict itself: the base loads only a part.",
        without="load_state_dict() of IsolatedOptimizer raises AttributeError.",
    ),
    Private(
        name="_optimizer_load_state_dict_post_hooks",
        where="an Optimizer",
        reason="As the hooks before it.",
        without="load_state_dict() of IsolatedOptimizer raises AttributeError.",
    ),
    # Tensors
    Private(
        name="_base",
        where="torch.Tensor",
        reason="The clocks of a captured step are elements of one vector. It finds that vector again after a load.",
        without="A step with clocks on the device raises AttributeError.",
    ),
    Private(
        name="_version",
        where="torch.Tensor",
        reason="IsolatedOptimizer keeps the positions of the protected entries until the importance is written.",
        without="A step of IsolatedOptimizer raises AttributeError.",
    ),
    Private(
        name="_post_accumulate_grad_hooks",
        where="torch.Tensor",
        reason="torch registers hooks of this kind and does not list them. A parameter is released to one optimizer.",
        without="release_gradients and the scores of PIECE raise AttributeError.",
    ),
    # Functions
    Private(
        name="_foreach_norm",
        where="torch",
        reason="The norms of many tensors in one launch. get_total_norm rounds those of bfloat16 tensors to bfloat16.",
        without="A step with clip_grad_norm raises AttributeError.",
    ),
    Private(
        name="_disable_dynamo",
        where="torch",
        reason="A compiler does not look into these functions. torch.compiler.disable imports the compiler at once.",
        without="The package cannot be imported.",
    ),
    Private(
        name="_pytree",
        where="torch.utils",
        reason="A batch is taken apart and cut into examples as torch.func does it.",
        without="epi_kernels.importance cannot be imported.",
    ),
    Private(
        name="_utils",
        where="torch.distributed.tensor",
        reason="Its compute_local_shape_and_global_offset says where a shard lies in the whole: noise goes by that.",
        without="A step of DTensors that rounds stochastically raises ImportError.",
    ),
    # What wrappers add to modules and parameters
    Private(
        name="_fsdp_flattened",
        where="a parameter of FullyShardedDataParallel",
        reason="It tells a slice that FSDP1 made from a parameter.",
        without="FSDP1 is not noticed: each rank chooses its own masks, and no error says so.",
    ),
    Private(
        name="_fsdp_wrapped_module",
        where="a FullyShardedDataParallel",
        reason="It is a part of the names of wrapped parameters, and no part of their layers.",
        without="Parameters have other layers and names under FSDP1: checkpoints of bare models go by position.",
    ),
    Private(
        name="_checkpoint_wrapped_module",
        where="a module under activation checkpointing",
        reason="As _fsdp_wrapped_module.",
        without="Parameters have other names under activation checkpointing: checkpoints go by position.",
    ),
    Private(
        name="_orig_mod",
        where="a compiled module",
        reason="As _fsdp_wrapped_module.",
        without="Parameters have other names in a compiled model: checkpoints of bare models go by position.",
    ),
)

BEHAVIOURS = (
    Behaviour(
        what="Optimizer's constructor adds each group by add_param_group",
        reason="Our settings are checked and added to a group there.",
        without="Groups lack our settings, and the first step raises KeyError.",
    ),
    Behaviour(
        what="load_state_dict calls pre hooks, __setstate__ and post hooks in this order",
        reason="One of our hooks checks the state before torch loads the groups, and another then puts ours in place.",
        without="States are loaded in the dtypes of the parameters, or not at all.",
    ),
    Behaviour(
        what="a scaler gives an optimizer found_inf and grad_scale for the time of a step",
        reason="The step divides by the scale, and does nothing where a gradient was infinite.",
        without="A step with a scaler and fused=True takes scaled gradients.",
    ),
    Behaviour(
        what="get_optimizer_state_dict makes a missing state by a step with lr 0 and gradients of 0",
        reason="That step must make the state and change nothing: no parameter, no clock, no mask.",
        without="The masks of a run that loads may come one step early.",
    ),
    Behaviour(
        what="a flattened state is loaded into the keys of optimizer.state",
        reason="What a checkpoint has must be in optimizer.state under the same keys, the importance included.",
        without="A tensor is saved and not loaded.",
    ),
    Behaviour(
        what="hooks_dict_ref of a hook's handle returns the dict that has the hook",
        reason="A released parameter is known by it, without a reference to the parameter.",
        without="release_gradients raises AttributeError at step().",
    ),
    Behaviour(
        what="torch.optim.adamw.adamw takes the tensors of a step as lists",
        reason="A differentiable step is torch's own.",
        without="differentiable=True raises TypeError.",
    ),
    Behaviour(
        what="a compiler takes the attribute param_groups of an optimizer for torch's own",
        reason="A compiled step goes by another attribute, so that changes of groups are seen.",
        without="Nothing: the other attribute is one like any other.",
    ),
)
