# SPDX-License-Identifier: Apache-2.0
"""ktransformers' rules against a model, as ktransformers applies them."""

from collections.abc import Iterable

from ktx_jax.model.config import Config
from ktx_jax.sharding.choices import Choice, Choices, Ops, Where
from ktx_jax.sharding.folding import fold_numbers, fold_paths, runs, split_layer
from ktx_jax.sharding.ktransformers_modules import CLASSES, OPERATORS, Module, children, is_a
from ktx_jax.sharding.parameters import EXPERTS, Inventory, Parameter
from ktx_jax.sharding.problems import Findings
from ktx_jax.sharding.rules_ktransformers import KTransformersRule, KTransformersRules

FIRST_DEVICE = "gpu:0"
Taken = dict[str, KTransformersRule | None]


def resolve_ktransformers(rules: KTransformersRules, inventory: Inventory, findings: Findings) -> Choices:
    """What the rules say of each module. Modules that no rule matches lie on the first device; a notice names them."""
    taken = _walk(rules, inventory.config)
    model = taken.get("model")
    threshold = (model.threshold if model is not None else None) or None
    by_path: dict[str, Choice] = {}
    uncovered = []
    for parameter in inventory.parameters:
        rule = _rule_of(parameter, taken, inventory.config, findings)
        if rule is None:
            uncovered.append(parameter.path)
        by_path[parameter.path] = _choice(rule, parameter, threshold, findings)
    for path in inventory.rotary_paths:
        rule = _nearest(taken, path)
        by_path[path] = Choice() if rule is None else Choice(Where(device=rule.generate), where_mark=rule.mark)
    _check_model_options(rules, model, findings)
    _check_transfers(model, by_path, inventory.config, findings)
    _check_out_devices(taken, by_path, findings)
    notices = [*_unused(rules, taken), *_ignored(rules), *_idle_prefill(taken, threshold)]
    if uncovered:
        notices.insert(
            0, f"no rule matches {', '.join(fold_paths(uncovered))}: placed on {FIRST_DEVICE}, as ktransformers does"
        )
    return Choices({}, None, by_path, threshold, yielding_ops=True, notices=tuple(notices))


def _walk(rules: KTransformersRules, config: Config) -> Taken:
    """The rule that takes each module; modules inside one that is not recursive are not in the result."""
    taken: Taken = {}
    fitting = {kind: [r for r in rules.rules if r.class_name is None or is_a(kind, r.class_name)] for kind in CLASSES}
    stack = [Module("", "causal_lm")]
    while stack:
        module = stack.pop()
        candidates = fitting[module.kind]
        rule = next((r for r in candidates if r.pattern is None or r.pattern.search(module.path)), None)
        taken[module.path] = rule
        if rule is None or rule.recursive:
            stack.extend(children(module, config))
    return taken


def _nearest(taken: Taken, path: str) -> KTransformersRule | None:
    """The rule of the module at `path`, or of the one around it that is not recursive."""
    while path not in taken:
        path = path.rpartition(".")[0]
    return taken[path]


def _rule_of(parameter: Parameter, taken: Taken, config: Config, findings: Findings) -> KTransformersRule | None:
    path = parameter.path
    if parameter.kind in ("self_attn.k_b_proj", "self_attn.v_b_proj"):
        path = path.replace(".k_b_proj", ".kv_b_proj").replace(".v_b_proj", ".kv_b_proj")
    stack, _, name = path.rpartition(".")
    if not parameter.is_expert or f"{stack}.0.{name}" not in taken:
        return _nearest(taken, path)
    each = [taken[f"{stack}.{i}.{name}"] for i in range(config.n_routed_experts)]
    devices = {rule.generate if rule else FIRST_DEVICE for rule in each}
    if len(devices) > 1:
        mark = next(rule.mark for rule in each if rule)
        findings.add_path(
            mark,
            f"the experts of {{path}} would lie on {', '.join(sorted(map(str, devices)))}: a layer's experts lie "
            f"together; match `{EXPERTS}$` with `recursive: False`",
            path,
        )
    return each[0]


def _choice(rule: KTransformersRule | None, parameter: Parameter, threshold: int | None, findings: Findings) -> Choice:
    if rule is None:
        return Choice(Where(device=FIRST_DEVICE))
    decode = rule.generate or FIRST_DEVICE
    streamed = threshold is not None and rule.prefill not in (None, decode)
    ops = {}
    for phase, name in (("decode", rule.generate_op), ("prefill", rule.prefill_op)):
        if name is not None:
            kind, ops[phase] = OPERATORS[name]
            if parameter.is_expert != (kind == "experts"):
                what = "the routed experts" if kind == "experts" else "single matrices"
                findings.add_path(rule.mark, f"{name} computes {what}; it cannot compute {{path}}", parameter.path)
    if threshold is None:  # prefill then runs as decode does
        ops["prefill"] = ops.get("decode")
    where = Where(device=decode, prefill=rule.prefill if streamed else None)
    return Choice(where, ops=Ops(**ops), where_mark=rule.mark, ops_mark=rule.mark)


def _check_model_options(rules: KTransformersRules, model: KTransformersRule | None, findings: Findings) -> None:
    for rule in rules.rules:
        for option in ("transfer_map", "per_layer_prefill_intput_threshold"):
            if option in rule.marks and rule is not model:
                findings.add(
                    rule.marks[option],
                    f"`{option}` acts only in the rule that takes the module `model`: match `^model$`",
                )


def _layer_devices(by_path: dict[str, Choice], config: Config) -> list[str]:
    choices = (by_path[f"model.layers.{i}.self_attn.o_proj"] for i in range(config.num_hidden_layers))
    return [choice.where.device or FIRST_DEVICE if choice.where else FIRST_DEVICE for choice in choices]


def _check_transfers(
    model: KTransformersRule | None, by_path: dict[str, Choice], config: Config, findings: Findings
) -> None:
    if model is None or not model.transfers:
        return
    mark, layers = model.marks["transfer_map"], config.num_hidden_layers
    if beyond := [layer for layer in model.transfers if layer >= layers]:
        findings.add(mark, f"`transfer_map` names layer {min(beyond)}; the model has {layers}, numbered from 0")
    devices = _layer_devices(by_path, config)
    moved, wrong = devices[0], []
    for layer, device in enumerate(devices):
        moved = model.transfers.get(layer, moved)
        if moved != device:
            wrong.append((layer, moved, device))
    for moved, device in dict.fromkeys((moved, device) for _, moved, device in wrong):
        which = [layer for layer, *pair in wrong if pair == [moved, device]]
        findings.add(
            mark,
            f"`transfer_map` contradicts the rules: it has hidden states on {moved} in layer{_s(which)} "
            f"{fold_numbers(which)}, which the rules place on {device}; {_right_map(devices)}",
        )


def _right_map(devices: list[str]) -> str:
    changes = {i: device for i, device in enumerate(devices) if i and device != devices[i - 1]}
    said = ", ".join(f"{layer}: {device.replace('gpu', 'cuda')}" for layer, device in changes.items())
    return f"the rules want {{{said}}}" if changes else "the rules keep all layers on one device"


def _s(items: Iterable[int]) -> str:
    found = runs(items)
    return "" if len(found) == 1 and found[0][0] == found[0][1] else "s"


def _check_out_devices(taken: Taken, by_path: dict[str, Choice], findings: Findings) -> None:
    for path, rule in taken.items():
        layer, _ = split_layer(path)
        if layer is None or rule is None or rule.out is None:
            continue
        where = by_path[f"model.layers.{layer}.self_attn.o_proj"].where
        if where is not None and where.device not in (None, rule.out):
            message = f"`out_device` {rule.out} contradicts the rules: the layer of {{path}} is on {where.device}"
            findings.add_path(rule.marks["out_device"], message, path)


def _unused(rules: KTransformersRules, taken: Taken) -> list[str]:
    used = {id(rule) for rule in taken.values()}
    return [
        f"line {rule.mark.line}: the rule takes no module of this model, or earlier rules take all that it matches"
        for rule in rules.rules
        if id(rule) not in used
    ]


def _ignored(rules: KTransformersRules) -> list[str]:
    return list(dict.fromkeys(said for rule in rules.rules for said in rule.ignored))


def _idle_prefill(taken: Taken, threshold: int | None) -> list[str]:
    idle = [p for p, r in taken.items() if r and r.prefill and r.prefill != (r.generate or FIRST_DEVICE)]
    if threshold is not None or not idle:
        return []
    folded = ", ".join(sorted(fold_paths(idle)))
    return [f"prefill_device of {folded} has no effect: per_layer_prefill_intput_threshold is 0 or not set"]
