"""What one stack is judged to be, and why some are refused."""

from moeconv.checkpoint.config import Config
from moeconv.checkpoint.header import StoredTensor
from moeconv.core.strict_json import Json
from moeconv.detect.judge import Evidence, judge
from moeconv.detect.stack import Sizes, Stack
from moeconv.errors import ConfigMismatch, Damaged, ExpertGap, MoeconvError
from moeconv.manifest.model import StackEntry
from tests.detect.stacks import STACK, experts, fused, matched


def judged(
    tensors: list[StoredTensor], recorded: StackEntry | None = None, **doc: Json
) -> Stack | list[MoeconvError]:
    config = Config(doc, present=bool(doc))
    return judge(matched(tensors), Evidence(config, None, recorded, {}))


def entry(experts: int) -> StackEntry:
    return StackEntry(STACK, "mixtral", "fused", "per-expert", experts, width=4, hidden=16)


def test_a_complete_stack_has_its_layout_sizes_and_tensors_in_the_order_of_experts():
    stack = judged(experts(12)[::-1], num_local_experts=12)
    assert isinstance(stack, Stack)
    assert (stack.layout.name, stack.sizes) == ("per-expert", Sizes(12, 4, 8))
    names = [t.name for t in stack.members[0].tensors]
    assert names == [f"{STACK}.{e}.w1.weight" for e in range(12)]


def test_a_fused_stack():
    stack = judged(fused((3, 8, 16), (3, 16, 4)))
    assert isinstance(stack, Stack)
    assert (stack.layout.name, stack.sizes) == ("fused", Sizes(3, 4, 16))


def test_a_missing_expert_is_refused():
    (problem,) = _problems(judged(experts(3)[3:]))
    assert isinstance(problem, ExpertGap)


def test_fewer_experts_than_config_json_states_are_refused():
    (problem,) = _problems(judged(experts(3), num_local_experts=4))
    assert isinstance(problem, ConfigMismatch)


def test_sizes_that_contradict_config_json_are_refused():
    (problem,) = _problems(judged(fused((3, 8, 16), (3, 16, 4)), hidden_size=8))
    assert isinstance(problem, ConfigMismatch)


def test_a_manifest_is_believed_before_config_json_and_its_sizes_are_compared():
    tensors = fused((3, 8, 16), (3, 16, 4))
    assert isinstance(judged(tensors, entry(3), hidden_size=8), Stack)
    (problem,) = _problems(judged(tensors, entry(4)))
    assert isinstance(problem, Damaged)


def _problems(found: Stack | list[MoeconvError]) -> list[MoeconvError]:
    assert isinstance(found, list)
    return found
