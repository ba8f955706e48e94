import torch
from threestudio.systems.weights import describe_problems, match_state


def state(*keys, shape=(2,)):
    return {key: torch.zeros(shape) for key in keys}


def test_equal_states_load_whole():
    match = match_state(state("a.w", "b.w"), state("a.w", "b.w"))
    assert set(match.loadable) == {"a.w", "b.w"}
    assert not (match.fresh or match.dropped or match.problems)


def test_a_module_wholly_absent_starts_fresh():
    match = match_state(state("geometry.a.w", "geometry.a.b", "background.c.w"),
                        state("geometry.a.w", "geometry.a.b"))
    assert match.fresh == ["background"] and not match.problems


def test_an_absent_named_child_starts_fresh():
    match = match_state(state("geometry.encoding.p", "geometry.normal.x.w", "geometry.normal.y.w"),
                        state("geometry.encoding.p"))
    assert match.fresh == ["geometry.normal"] and not match.problems


def test_a_module_of_the_file_alone_is_dropped():
    match = match_state(state("geometry.w"), state("geometry.w", "guidance.lora.w"))
    assert match.dropped == ["guidance"] and not match.problems


def test_a_partly_matching_module_is_refused_with_its_keys():
    match = match_state(state("a.w", "a.bias"), state("a.w", "a.scale"))
    assert match.problems == ["a.bias: here, but not in the file",
                              "a.scale: in the file, but not here"]


def test_a_deeper_network_is_no_fresh_module():
    match = match_state(state("mlp.layers.0.w", "mlp.layers.2.w"), state("mlp.layers.0.w"))
    assert match.problems == ["mlp.layers.2.w: here, but not in the file"]
    match = match_state(state("mlp.layers.0.w"), state("mlp.layers.0.w", "mlp.layers.2.w"))
    assert match.problems == ["mlp.layers.2.w: in the file, but not here"]


def test_a_renamed_child_is_no_fresh_module():
    match = match_state(state("net.a.w", "net.new.w"), state("net.a.w", "net.old.w"))
    assert match.problems == ["net.new: here, but not in the file",
                              "net.old: in the file, but not here"]


def test_roots_may_come_and_go_together():
    match = match_state(state("a.w", "background.w"), state("a.w", "guidance.w"))
    assert match.fresh == ["background"] and match.dropped == ["guidance"] and not match.problems


def test_shapes_are_named():
    match = match_state(state("a.w"), state("a.w", shape=(3, 1)))
    assert match.problems == ["a.w: shape (3, 1) in the file, (2,) here"]


def test_bookkeeping_starts_fresh():
    match = match_state(state("r.w", "r.occupancy"), state("r.w"), trained={"r.w"})
    assert match.fresh == ["r.occupancy"] and not match.problems


def test_long_lists_are_cut():
    text = describe_problems([f"k{i}" for i in range(11)])
    assert text.startswith("k0; k1") and text.endswith("k7; and 3 more")
