"""A chunk of a workload enters a cluster: programs, calls and nodes take free rows (compiled)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmsched_env.cluster import state as cs
from llmsched_env.cluster.calls import NO_PARENT, CallChunk
from llmsched_env.cluster.kernel import cluster_at
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.records import Indices, Record, Vector, reader


class ChunkRecord(Record):
    """``CallChunk`` as compiled code reads it."""

    start: Vector
    think: Vector
    app: Indices
    program: Indices
    parent: Indices
    prompt: Indices
    output: Indices
    predicted: Indices
    node: Indices
    node_program: Indices
    node_parent: Indices
    node_shared: Indices
    lasting: bool
    # rows that they have taken
    program_row: Indices
    call_row: Indices
    node_row: Indices
    node_blocks: Indices  # of the longest prompt and answer

    @classmethod
    def of(cls, chunk: CallChunk) -> ChunkRecord:
        def wide(values: Any) -> Any:
            return np.ascontiguousarray(values, dtype=np.int64)

        record = cls(
            start=np.ascontiguousarray(chunk.start, dtype=np.float64),
            think=np.ascontiguousarray(chunk.think, dtype=np.float64),
            app=wide(chunk.app),
            program=wide(chunk.program),
            parent=wide(chunk.parent),
            prompt=wide(chunk.prompt_tokens),
            output=wide(chunk.output_tokens),
            predicted=wide(chunk.predicted_tokens),
            node=wide(chunk.node),
            node_program=wide(chunk.node_program),
            node_parent=wide(chunk.node_parent),
            node_shared=wide(chunk.node_shared),
            program_row=np.zeros(chunk.start.size, dtype=np.int64),
            call_row=np.zeros(len(chunk), dtype=np.int64),
            node_row=np.zeros(chunk.node_program.size, dtype=np.int64),
            node_blocks=np.zeros(chunk.node_program.size, dtype=np.int64),
        )
        record.lasting = chunk.lasting
        return record


chunk_at = reader(ChunkRecord)


@compiled
def load_at(cluster: Any, chunk: Any) -> None:
    """A chunk into rows that are free: there must be enough."""
    c, k = cluster_at(cluster), chunk_at(chunk)
    load_programs(c, k)
    load_nodes(c, k)
    load_calls(c, k)


@compiled
def load_programs(cluster: Cluster, chunk: ChunkRecord) -> None:
    programs = cluster.programs
    count = chunk.start.shape[0]
    for i in range(count):
        p = cluster.free_program
        cluster.free_program = programs.next[p]
        chunk.program_row[i] = p
        cluster.starts.program[i] = p
        programs.start[p] = chunk.start[i]
        programs.number[p] = cluster.next_program + i
        programs.app[p] = chunk.app[i]
        programs.left[p] = 0
        programs.child[p] = -1
        programs.home[p] = -1
        programs.node[p] = -1
    cluster.free_programs -= count
    cluster.next_program += count
    cluster.next_start = 0
    cluster.num_starts = count


@compiled
def load_nodes(cluster: Cluster, chunk: ChunkRecord) -> None:
    """Nodes with numbers of their own for as many blocks as their longest call has."""
    nodes, size = cluster.nodes, cluster.block_size
    for i in range(chunk.program.shape[0]):
        blocks = (chunk.prompt[i] + chunk.output[i] + size - 1) // size
        chunk.node_blocks[chunk.node[i]] = max(chunk.node_blocks[chunk.node[i]], blocks)
    count = chunk.node_program.shape[0]
    for i in range(count):  # and for what others have in common with them, should no call of theirs be so long
        parent = chunk.node_parent[i]
        if parent >= 0:
            chunk.node_blocks[parent] = max(chunk.node_blocks[parent], chunk.node_shared[i] // size)
    for i in range(count):
        n = cluster.free_node
        cluster.free_node = cluster.owners.next[n]
        chunk.node_row[i] = n
        parent = chunk.node_parent[i]
        nodes.parent[n] = -1 if parent == NO_PARENT else chunk.node_row[parent] if parent >= 0 else -2 - parent  # applications come first
        nodes.shared[n] = 0 if parent == NO_PARENT else chunk.node_shared[i] // size
        nodes.base[n] = cluster.next_base
        cluster.next_base += chunk.node_blocks[i]
        if chunk.lasting == 0:
            p = chunk.program_row[chunk.node_program[i]]
            cluster.owners.next[n] = cluster.programs.node[p]
            cluster.programs.node[p] = n
    cluster.free_nodes -= count


@compiled
def load_calls(cluster: Cluster, chunk: ChunkRecord) -> None:
    calls, programs = cluster.calls, cluster.programs
    count = chunk.program.shape[0]
    for i in range(count):
        c = cluster.free_call
        cluster.free_call = calls.sibling[c]
        chunk.call_row[i] = c
        p = chunk.program_row[chunk.program[i]]
        parent = chunk.parent[i]
        calls.arrival[c] = chunk.think[i]
        calls.admitted[c] = math.nan
        calls.first_token[c] = math.nan
        calls.number[c] = cluster.next_number + i
        calls.prompt[c] = chunk.prompt[i]
        calls.output[c] = chunk.output[i]
        calls.predicted[c] = chunk.predicted[i]
        calls.node[c] = chunk.node_row[chunk.node[i]]
        calls.program[c] = p
        calls.turn[c] = 0 if parent < 0 else calls.turn[chunk.call_row[parent]] + 1
        calls.child[c] = -1
        calls.part[c] = cs.PREFILLS if cluster.separated != 0 else cs.WHOLE
        calls.replica[c] = -1
        calls.arrived[c] = 0
        calls.evictions[c] = 0
        calls.cached[c] = -1
        calls.routed[c] = 0
        programs.left[p] += 1
        cluster.unreleased += (parent >= 0) + cluster.separated
    for i in range(count - 1, -1, -1):  # lists in the order of the chunk
        c = chunk.call_row[i]
        parent = chunk.parent[i]
        if parent >= 0:
            above = chunk.call_row[parent]
            calls.sibling[c] = calls.child[above]
            calls.child[above] = c
        else:
            p = chunk.program_row[chunk.program[i]]
            calls.sibling[c] = programs.child[p]
            programs.child[p] = c
    cluster.free_calls -= count
    cluster.next_number += count
