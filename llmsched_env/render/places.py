"""Where requests and their KV are, as the table and the squares of a frame show them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsched_env.backend import ResidentRequests, View
from llmsched_env.render.names import Names

Table = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Places:
    """(rows, columns) of ``Names``, int64.

    Attributes:
        residents: requests inside the segments; boundary: in the boundary queues before them.
        decode_kv: KV units of those inside whose prefill is done; boundary_kv: of the boundary queues.
        prefill_kv: of all others, one number.
    """

    residents: Table
    boundary: Table
    decode_kv: Table
    boundary_kv: Table
    prefill_kv: int


def places_of(view: View, names: Names) -> Places:
    """The places of all residents."""
    residents = view.resident_requests()
    prefills = (residents.computed < residents.prefill_target) & ~residents.at_boundary
    kv = kv_units(view, residents)
    if names.bands:
        shape = (1, len(names.bands) + 1)
        place = np.searchsorted(np.asarray(names.bands), residents.generated, side="right")
        nobody = np.zeros((1, len(names.columns)), dtype=np.int64)
        count = np.bincount(place, minlength=shape[1]).reshape(shape)
        decode = np.bincount(place, weights=kv * ~prefills, minlength=shape[1]).reshape(shape).astype(np.int64)
        return Places(names.grouped(count), nobody, names.grouped(decode), nobody, int(kv[prefills].sum()))
    queued = view.waiting.copy()
    queued[:, 0] = 0
    number = view.layout.num_queues
    found = np.bincount(residents.queue[prefills], weights=kv[prefills], minlength=number).astype(np.int64)
    prefill = np.minimum(found.reshape(queued.shape), view.resident_kv)
    return Places(
        names.grouped(view.residents),
        names.grouped(queued),
        names.grouped(view.resident_kv - prefill),
        names.grouped(view.boundary_kv),
        int(prefill.sum()),
    )


def kv_units(view: View, residents: ResidentRequests) -> Table:
    """(n,) KV units of each resident: tokens, or the blocks that they fill."""
    tokens = residents.computed.astype(np.int64)
    return tokens if view.engine.preset == "paper" else -(-tokens // view.engine.block_size)
