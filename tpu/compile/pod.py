"""The compiler of a pod that is not there: topologies, meshes of their devices, compiled programs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import tempfile
import time
from typing import TYPE_CHECKING, Any

from tpu.chips import Topology, gpu_chip, parse_topology
from tpu.errors import UserError
from train.config import Experiment
from train.resolve import on

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from jax.stages import Lowered

    from tpu.compile.report import Compiled, Report
    from train.program import Program


def prepare(topology: str) -> None:
    """Sets the environment that a topology needs; before jax starts. Raises UserError where libtpu is missing."""
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # A program for devices that are not there cannot be reloaded.
    os.environ["JAX_PLATFORMS"] = "cuda,cpu" if topology == "gpu" else "cpu"
    if topology == "gpu":
        return
    found = parse_topology(topology)
    if found.chip is None:
        devices = f"--xla_force_host_platform_device_count={found.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()
        return
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={topology}: the TPU compiler is missing; pip install libtpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ |= quiet | {"TPU_ACCELERATOR_TYPE": "v5p-8"}


def compile_step(experiment: Experiment, topology: str, slices: int = 1) -> Report:
    """Compiles the training step of a resolved experiment for a topology; `prepare` comes first, before jax starts.

    Args:
      experiment: its mesh may hold one -1.
      topology: of one slice, as `parse_topology` reads it, or "gpu".
      slices: joined along `mesh.slice_axis`.
    Raises UserError where the mesh does not fit the topology. A step that does not fit the memory gives a report.
    """
    import jax

    from tpu.compile.report import make_report
    from train.layout import abstract_batch
    from train.program import make_program

    experiment, found, mesh = place(experiment, topology, slices)
    with jax.set_mesh(mesh):
        program = make_program(experiment, mesh)
        compiled = compile_and_read(
            program.step.lower(program.abstract_state, abstract_batch(experiment), program.abstract_frozen), found
        )
    state = program.abstract_state
    parts = {"weights": state.weights, "optimizer": state.optimizer_state, "ema": state.ema}
    tokens = experiment.data.batch_size * experiment.data.context
    return make_report("train", experiment, found, mesh, compiled, parts, tokens, experiment.data.context)


def compile_decode(experiment: Experiment, topology: str, slices: int, rows: int, context: int) -> Report:
    """As `compile_step`, the generation of one token: `rows` rows at a time, a cache of `context` slots."""
    import jax

    from model.generate.decode import make_decoder
    from tpu.compile.report import make_report
    from train.program import make_program

    experiment.model.check_context(context, "--context")
    experiment, found, mesh = place(experiment, topology, slices)
    with jax.set_mesh(mesh):
        program = make_program(experiment, mesh)
        decoder = make_decoder(experiment.model, program.graphdef, experiment.model.vocab_size, end_of_document=0)
        weights, state, sampling = _decode_arguments(experiment, mesh, program, rows, context)
        compiled = compile_and_read(decoder.decode.lower(weights, state, sampling, chunk=1), found)
    parts = {"weights": weights, "cache": state.cache}
    return make_report("decode", experiment, found, mesh, compiled, parts, rows, context)


def place(experiment: Experiment, topology: str, slices: int = 1) -> tuple[Experiment, Topology, Mesh]:
    """The experiment as decided for the devices of a topology, the topology, and the mesh on its devices."""
    import jax

    from tpu.host import fast_dtype
    from tpu.mesh import make_mesh

    if topology == "gpu":
        try:
            devices = jax.devices("gpu")
        except RuntimeError as error:
            missing = "jax finds no GPU here; pip install 'jax[cuda13]', or give --topology"
            raise UserError(f"--platform=gpu: {missing}") from error
        found, platform = Topology(gpu_chip(devices[0].device_kind), (len(devices),)), "gpu"
    else:
        found = parse_topology(topology)
        platform = "tpu" if found.chip else "cpu"
        devices = tpu_devices(found, slices) if found.chip else jax.devices()[: found.devices * slices]
    mesh = dataclasses.replace(experiment.mesh, slices=slices)
    experiment = on(dataclasses.replace(experiment, mesh=mesh), len(devices), platform, fast_dtype(platform))
    return experiment, found, make_mesh(experiment.mesh, devices)


def tpu_devices(topology: Topology, slices: int) -> list[Any]:
    """The devices of TPU slices that need not be there."""
    from jax.experimental.topologies import get_topology_desc

    chip = topology.chip
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores as one device, as on the machines
    if topology.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{chip.libtpu_name}:{'x'.join(map(str, topology.shape))}"
    try:
        return list(get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:  # libtpu's own, whose type varies
        raise UserError(f"--topology={topology}: libtpu {importlib.metadata.version('libtpu')}: {error}") from error


def compile_and_read(lowered: Lowered, topology: Topology) -> Compiled:
    """Compiles a program and reads the text of what came out, which of one too large for the memory may be less."""
    import jax

    from tpu.compile.report import Compiled, out_of_memory

    start = time.perf_counter()
    on_tpu = topology.chip is not None and topology.chip.torus > 0
    with tempfile.TemporaryDirectory(prefix="foursight-compile-") as folder:
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder} if on_tpu else None)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Compiled(_dumped(folder), time.perf_counter() - start, False, *out_of_memory(str(error)))
        seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()
        text = _dumped(folder) if on_tpu else compiled.as_text()
    host = memory.host_argument_size_in_bytes + memory.host_output_size_in_bytes - memory.host_alias_size_in_bytes
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    together = arguments + temporary + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # XLA:CPU gives a peak without the temporaries, libtpu one with what lies with the host.
    peak = memory.peak_memory_in_bytes - host if on_tpu else together
    return Compiled(text, seconds, True, temporary, peak, host + memory.host_temp_size_in_bytes)


def _dumped(folder: str) -> str:
    """The module that libtpu wrote to a folder, after code generation where it came so far."""
    for ending in ("after_codegen.txt", "after_optimizations.txt"):
        if found := list(pathlib.Path(folder).glob(f"*.{ending}")):
            return found[0].read_text(encoding="utf-8")
    return ""


def _decode_arguments(experiment: Experiment, mesh: Mesh, program: Program, rows: int, context: int) -> tuple:
    """Abstract weights, rows and sampling of `model.generate.decode`, laid out on the mesh."""
    import jax

    from model.attention.cache import Cache, empty_cache
    from model.generate.decode import Rows, decoding_weights, row_keys
    from model.generate.sampling import Sampling
    from tpu import rules

    def laid_out(leaf: Any, *axes: str) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rules.sharding(mesh, axes, leaf.shape))

    def array(dtype: Any, *shape: int) -> Any:
        axes = ("batch", "vocab")[: len(shape)]
        return laid_out(jax.ShapeDtypeStruct(shape, dtype), *axes)

    model = experiment.model
    weights = jax.eval_shape(lambda w: decoding_weights(model, w), program.abstract_state.weights)
    if model.layer_loop == "scan":
        weights = jax.tree.map(
            lambda w, old: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=old.sharding),
            weights,
            program.abstract_state.weights,
        )
    empty = jax.eval_shape(lambda: empty_cache(model, rows, context))
    stacked = ("norm",) if model.layer_loop == "scan" else ()
    layers = jax.tree.map(lambda a: laid_out(a, *stacked, "batch", "kv_heads", "positions", "head_dim"), empty.layers)
    slots = jax.tree.map(lambda a: laid_out(a, "batch", "positions"), empty.slots)
    keys = jax.eval_shape(lambda: row_keys([0] * rows, [0] * rows))
    state = Rows(
        cache=Cache(slots, layers),
        tokens=array("int32", rows),
        positions=array("int32", rows),
        limits=array("int32", rows),
        finished=array("bool", rows),
        seen=array("bool", rows, model.vocab_size),
        keys=laid_out(keys, "batch"),
    )
    sampling = Sampling(*(array("int32" if name == "top_k" else "float32", rows) for name in Sampling._fields))
    return weights, state, sampling
