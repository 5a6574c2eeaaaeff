"""Mixture of experts: a router sends each token to a few of many feed-forward blocks (arXiv:1701.06538, Switch
arXiv:2101.03961, Mixtral arXiv:2401.04088, DeepSeekMoE arXiv:2401.06066, DeepSeek-V3 arXiv:2412.19437).

An assignment is one choice of one token. Every form below gives each assignment a slot, multiplies the rows of the
slots by their experts' matrices, and sums what comes back for a token by the router's weights:

- dropless on one device: slots in the order of the experts (`linear.grouped_matmul`);
- dropless over the mesh axis of the experts: as many slots as an even load needs and half as many again; assignments
  beyond them take another round, so that memory does not depend on the load, and nothing is dropped;
- with a capacity: a fixed number of slots for each row of the batch and expert. Earlier tokens come first, so that
  nothing depends on later ones, and rows are whole on every mesh, so that none drops other tokens.

Legend: B rows, T tokens, D embed_dim, E experts, K experts per token, N tokens of a device, A = N K assignments,
S slots, X devices along the axis of the experts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from model.config import ModelConfig
from model.fields.shape import GATED
from model.linear import GroupedLinear, batched_matmul, exact_matmul, grouped_matmul, initializer, parameter, zeros
from model.mlp import MLP, nonlinearity
from tpu import rules

HEADROOM = 1.5  # slots of one round, over those that an even load needs


class Routing(NamedTuple):
    """What the router of one layer did: float32 sums over the tokens that are no padding.

    Sums over micro-batches and devices are those of the whole batch, so that losses and figures made of them
    (`train.optimize.balance`) are too. Gradients flow through `probability` and `z`.
    """

    load: jax.Array  # [E] assignments, dropped ones included
    probability: jax.Array  # [E] of the scores, as shares of a token's sum
    z: jax.Array  # [] of logsumexp(logits)^2
    entropy: jax.Array  # [] of these shares, in nats
    dropped: jax.Array  # [] assignments
    tokens: jax.Array  # []


class MoE(nnx.Module):
    """Router, experts, and the shared experts as one dense block."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        embed, hidden = (config.embed_dim, "embed"), (config.expert_dim, "mlp")
        draw, shape = initializer(config), (config.embed_dim, config.experts)
        # No "kernel": it is not rounded, nor is anything done to it that is done to those.
        self.router = parameter(rngs, shape, ("embed", "experts"), "float32", lambda k, s: draw(k, s, *shape))
        # Moved by the load (`train.optimize.balance`); its gradient is zero.
        bias = config.router_bias
        self.balance_bias = parameter(rngs, (config.experts,), ("experts",), "float32", zeros) if bias else None
        gated = config.activation in GATED
        self.gate = GroupedLinear(config, embed, hidden, rngs) if gated else None
        self.up = GroupedLinear(config, embed, hidden, rngs)
        self.down = GroupedLinear(config, hidden, embed, rngs, residual=True)
        shared = dataclasses.replace(config, mlp_dim=config.shared_experts * config.expert_dim)
        self.shared = MLP(shared, rngs) if config.shared_experts else None
        self.experts, self.per_token, self.capacity_factor = (
            config.experts,
            config.experts_per_token,
            config.capacity_factor,
        )
        self.sigmoid, self.renormalize, self.scale = (
            config.router == "sigmoid",
            config.router_renormalize,
            config.router_scale,
        )
        self.activation, self.compute_dtype, self.platform = config.activation, config.compute_dtype, config.platform

    def __call__(self, x: jax.Array, real: jax.Array, dropless: bool) -> tuple[jax.Array, Routing]:
        """x [B, T, D], real [B, T] bool (no padding) -> ([B, T, D], what the router did); padding gets zeros.

        With `dropless` no token is dropped, whatever the capacity.
        """
        with jax.named_scope("router"):
            index, weight, routing = self.choose(x, real)
        capacity = 0
        if self.capacity_factor and not dropless:
            capacity = math.ceil(self.capacity_factor * x.shape[1] * self.per_token / self.experts)
        out, dropped = self._on_mesh(x, index, weight, capacity)
        routing = routing._replace(dropped=jnp.sum(dropped, dtype=jnp.float32))
        return out if self.shared is None else out + self.shared(x), routing

    def choose(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array, Routing]:
        """The experts of each token [B, T, K] int32 (E for padding), their weights [B, T, K] float32, and sums.

        Scores are float32. "softmax": over all experts, then the largest; renormalised this is a softmax over the
        chosen logits. "sigmoid": DeepSeek-V3 (arXiv:2412.19437), equations 12 to 16. A bias decides who is chosen,
        never with what weight.
        """
        logits = exact_matmul(x, self.router.get_value())  # [B, T, E]
        logits = rules.constrain(logits, "batch", "residual_sequence", "activation_embed")
        scores = jax.nn.sigmoid(logits) if self.sigmoid else jax.nn.softmax(logits)
        shares = scores / (scores.sum(-1, keepdims=True) + 1e-20) if self.sigmoid else scores
        preference = jax.lax.stop_gradient(scores)
        if self.balance_bias is not None:
            preference = preference + jax.lax.stop_gradient(self.balance_bias.get_value())
        index = jax.lax.top_k(preference, self.per_token)[1]  # [B, T, K]
        chosen = index[..., None] == jnp.arange(self.experts)[None, None, None]  # [B, T, K, E]
        weight = jnp.where(chosen, scores[..., None, :], 0.0).sum(-1)
        if self.renormalize:
            weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
        mask = real.astype(jnp.float32)[..., None]
        entropy = -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1.0)), 0.0), -1)
        routing = Routing(
            load=jnp.sum(jnp.where(chosen, mask[..., None], 0.0), (0, 1, 2)),
            probability=jnp.sum(shares * mask, (0, 1)),
            z=jnp.sum(jnp.square(jax.nn.logsumexp(logits, -1)) * mask[..., 0]),
            entropy=jax.lax.stop_gradient(jnp.sum(entropy * mask[..., 0])),
            dropped=jnp.zeros(()),
            tokens=mask.sum(),
        )
        return jnp.where(real[..., None], index, self.experts), weight * self.scale, routing

    def _on_mesh(self, x: jax.Array, index: jax.Array, weight: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
        """The experts' sum for x [B, T, D], and how many choices of each token [B, T] were dropped.

        On a mesh every device has its tokens, its experts and its columns of them. Where columns are cut it gathers the
        tokens of those who share them, and where matrices are cut otherwise the rest of them.
        """
        projections = [p for p in (self.gate, self.up, self.down) if p is not None]
        kernels = [p.matrices() for p in projections]
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return self._on_device(x, index, weight, kernels, capacity, (), ())
        rows = rules.partition_spec(("batch", "residual_sequence", "activation_embed"), mesh, x.shape)
        layouts = [rules.partition_spec(p.axes, mesh, k.shape) for p, k in zip(projections, kernels, strict=True)]
        experts, columns = (_axes(d) for d in layouts[-1][:2])
        gathered = tuple(axis for axis in columns if axis in _axes(rows[1]))
        away = tuple(axis for axis in experts if axis in rules.axes_in(rows))
        here = tuple(axis for axis in experts if axis not in away)  # Every device along it has the same tokens.
        summed = here + tuple(axis for axis in columns if axis not in gathered)

        def each(
            x: jax.Array, index: jax.Array, weight: jax.Array, kernels: list[jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            if gathered:
                x = jax.lax.all_gather(x, gathered, axis=1, tiled=True)
            whole = []
            for kernel, p, layout in zip(kernels, projections, layouts, strict=True):
                at = p.axes.index("embed")
                cut = _axes(layout[at])
                whole.append(jax.lax.all_gather(kernel, cut, axis=at, tiled=True) if cut else kernel)
            if here:
                mine = index - jax.lax.axis_index(here) * len(whole[0])
                index = jnp.where((mine >= 0) & (mine < len(whole[0])), mine, self.experts)
            out, dropped = self._on_device(x, index, weight, whole, capacity, away, axes)
            if gathered:
                out = jax.lax.psum_scatter(out, gathered, scatter_dimension=1, tiled=True)
            return jax.lax.psum(out, summed), jax.lax.psum(dropped, here)

        axes, tokens = tuple(rules.free_axes(mesh)), PartitionSpec(*rules.without(rows, columns)[:2])
        across = jax.shard_map(
            each,
            mesh=mesh,
            in_specs=(rows, tokens, tokens, layouts),
            out_specs=(rows, tokens),
            axis_names=set(axes),
            check_vma=False,
        )
        return across(x, index, weight, kernels)

    def _on_device(
        self,
        x: jax.Array,
        index: jax.Array,
        weight: jax.Array,
        kernels: list[jax.Array],
        capacity: int,
        away: tuple[str, ...],
        axes: tuple[str, ...],
    ) -> tuple[jax.Array, jax.Array]:
        """As `_on_mesh`, from one device: its tokens, the kernels it holds, those of others along the axes `away`.

        An index beyond the experts is no assignment. `axes` are all axes of the mesh.
        """
        b, t, k = index.shape
        held, devices = len(kernels[0]), jax.lax.axis_size(away) if away else 1
        experts = held * devices
        ids = jnp.minimum(index.reshape(-1), experts)  # [A]
        x, weight = x.reshape(b * t, -1), weight.reshape(b * t, k)
        dropped = jnp.zeros((b, t), jnp.int32)
        if capacity:
            row = jnp.arange(len(ids)) // (t * k)
            position, _ = _queued(jnp.where(ids < experts, row * experts + ids, b * experts), b * experts)
            slot = (ids * b + row) * capacity + position
            slot = jnp.where((ids < experts) & (position < capacity), slot, experts * b * capacity)
            dropped = ((ids < experts) & (position >= capacity)).reshape(b, t, k).sum(-1, dtype=jnp.int32)
            multiply = functools.partial(batched_matmul, dtype=self.compute_dtype)

            def compute(rows: jax.Array) -> jax.Array:
                rows = rows.reshape(experts, b * capacity, -1)
                if away:
                    rows = jax.lax.all_to_all(rows, away, 0, 1, tiled=True)  # [held, X b C, D]
                rows = self._feed_forward(rows, kernels, multiply)
                if away:
                    rows = jax.lax.all_to_all(rows, away, 1, 0, tiled=True)
                return rows.reshape(experts * b * capacity, -1)

            out = _weighted(x, weight, slot, experts * b * capacity, compute)
        elif not away:
            out = _weighted(x, weight, *self._sorted(ids, kernels))
        else:
            share = HEADROOM * len(ids) / devices
            size = min(len(ids), math.ceil(share / 128) * 128)  # in which the TPU's grouped products come
            target = ids // held  # `devices` for no assignment
            position, counts = _queued(target, devices)
            rounds = jax.lax.pmax(-(-counts.max() // size), axes)

            def one_round(number: jax.Array, plan: tuple[jax.Array, ...], arrays: tuple) -> jax.Array:
                ids, target, position = plan
                x, weight, kernels = arrays
                place = position - number * size
                now = (target < devices) & (place >= 0) & (place < size)
                slot = jnp.where(now, target * size + place, devices * size)
                local = jnp.full(devices * size, held).at[slot].set(ids - target * held, mode="drop")
                slots, after, compute = self._sorted(exchanged(local), kernels)
                return _weighted(
                    x, weight, slot, devices * size, lambda r: exchanged(_sent(exchanged(r), slots, after, 1, compute))
                )

            def exchanged(rows: jax.Array) -> jax.Array:
                return jax.lax.all_to_all(rows, away, 0, 0, tiled=True)

            out = _in_rounds(one_round, rounds, (ids, target, position), (x, weight, kernels))
        return out.astype(x.dtype).reshape(b, t, -1), dropped

    def _sorted(self, ids: jax.Array, kernels: list[jax.Array]) -> tuple[jax.Array, int, Callable]:
        """Slots in the order of the experts for assignments to `ids` [A]: the slot of each, how many, the experts."""
        position, sizes = _queued(ids, len(kernels[0]))
        starts = jnp.append(jnp.cumsum(sizes) - sizes, len(ids))
        slot = jnp.minimum(starts[ids] + position, len(ids))

        def multiply(rows: jax.Array, kernel: jax.Array) -> jax.Array:
            return grouped_matmul(rows, kernel, sizes, self.compute_dtype, self.platform)

        return slot, len(ids), lambda rows: self._feed_forward(rows, kernels, multiply)

    def _feed_forward(self, rows: jax.Array, kernels: list[jax.Array], multiply: Callable) -> jax.Array:
        *into, down = kernels
        h = [checkpoint_name(multiply(rows, kernel), "mlp") for kernel in into]
        return multiply(nonlinearity(self.activation, *h), down)


def _weighted(x: jax.Array, weight: jax.Array, slot: jax.Array, slots: int, compute: Callable) -> jax.Array:
    """The sum over a token's assignments of weight [N, K] times what comes back for them: [N, D] float32."""
    back = _sent(x, slot, slots, weight.shape[1], compute).reshape(*weight.shape, -1)
    return jnp.sum(weight[..., None] * back.astype(jnp.float32), axis=1)


def _sent(x: jax.Array, slot: jax.Array, slots: int, copies: int, compute: Callable) -> jax.Array:
    """compute([S, D] -> [S, D]) of rows of x [A / copies, D] at the slots [A] of their assignments: [A, D].

    A slot that nobody has is zero; an assignment whose slot is S gets zeros.
    """
    source = jnp.full(slots, len(slot)).at[slot].set(jnp.arange(len(slot)), mode="drop")
    return _taken(compute(_taken(x, source, slot, copies)), slot, source, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _taken(x: jax.Array, source: jax.Array, slot: jax.Array, copies: int) -> jax.Array:
    """Row i is row source[i] // copies of x, or zero behind its end. `slot` is the inverse of `source`.

    So the gradient takes rows too; JAX's own would add them up one by one.
    """
    return jnp.take(x, source // copies, axis=0, mode="fill", fill_value=0)


def _taken_forward(x: jax.Array, source: jax.Array, slot: jax.Array, copies: int) -> tuple[jax.Array, jax.Array]:
    return _taken(x, source, slot, copies), slot


def _taken_backward(copies: int, slot: jax.Array, g: jax.Array) -> tuple[jax.Array, None, None]:
    back = jnp.take(g, slot, axis=0, mode="fill", fill_value=0)
    return back.reshape(-1, copies, g.shape[1]).sum(1), None, None


_taken.defvjp(_taken_forward, _taken_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(one_round: Callable, rounds: jax.Array, plan: Any, arrays: Any) -> jax.Array:
    """The sum of one_round(number, plan, arrays) over `rounds` numbers. The backward pass computes each again, so that
    memory is that of one. `plan` holds integers, `arrays` what there are gradients for."""
    shape = jax.eval_shape(one_round, rounds, plan, arrays)
    zero = jnp.zeros(shape.shape, shape.dtype)
    return jax.lax.fori_loop(0, rounds, lambda i, total: total + one_round(i, plan, arrays), zero)


def _in_rounds_forward(one_round: Callable, rounds: jax.Array, plan: Any, arrays: Any) -> tuple[jax.Array, tuple]:
    return _in_rounds(one_round, rounds, plan, arrays), (rounds, plan, arrays)


def _in_rounds_backward(one_round: Callable, saved: tuple, g: jax.Array) -> tuple[None, None, Any]:
    rounds, plan, arrays = saved

    def add(number: jax.Array, totals: Any) -> Any:
        pull = jax.vjp(lambda arrays: one_round(number, plan, arrays), arrays)[1]
        return jax.tree.map(jnp.add, totals, pull(g)[0])

    return None, None, jax.lax.fori_loop(0, rounds, add, jax.tree.map(jnp.zeros_like, arrays))


_in_rounds.defvjp(_in_rounds_forward, _in_rounds_backward)


def _queued(ids: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """For ids [A] from 0 to `count`: how many of the same come earlier [A], and how many [count] there are of each."""
    order = jnp.argsort(ids, stable=True)
    starts = jnp.searchsorted(ids[order], jnp.arange(count + 1))
    earlier = jnp.arange(len(ids)) - starts[ids[order]]
    return jnp.zeros_like(earlier).at[order].set(earlier, unique_indices=True), jnp.diff(starts)


def _axes(dimension: Any) -> tuple[str, ...]:
    return rules.axes_in(PartitionSpec(dimension))
