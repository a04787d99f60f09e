"""Once: what one model makes of splits and texts, for all evaluators of an evaluation together."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import numpy as np

from clipjax.data import EvalSet, Source, load_eval
from clipjax.evals.embed import Output, embed_images
from clipjax.predictor import Predictor


class Once:
    """Splits read once, and their pictures and all texts embedded once for one set of weights.

    Runners that `build_runners` makes share one. Embeddings are kept until another predictor asks,
    or the one that made them is gone; splits as long as their runners.
    """

    def __init__(self) -> None:
        self._splits: list[tuple[Any, int | None, EvalSet]] = []
        self._wholes: dict[int, EvalSet] = {}  # by id of a part's pictures, what it is the start of
        self._owner: weakref.ref[Predictor] | None = None
        self._images: dict[Any, tuple[np.ndarray, np.ndarray]] = {}  # embeddings, which are made
        self._places: dict[bytes, int] = {}  # a text's row in the table
        self._table: np.ndarray | None = None

    def split(self, source: Source, predictor: Predictor, limit: int | None = None) -> EvalSet:
        """The first `limit` records of a source, as this model sees pictures.

        Of a split that was read further already it is a part, which shares its embeddings.
        """
        asked = (source, predictor.image_size, predictor.resize)
        for known, read, data in self._splits:
            ended = read is None or data.tried < read  # there are no more records
            if known == asked and (
                read == limit or (ended and (limit or data.tried) >= data.tried)
            ):
                return data
        for known, _, data in self._splits:
            if known == asked and limit is not None and limit < data.tried:
                part = data.first(limit)
                self._splits.append((asked, limit, part))
                self._wholes[id(part.images)] = self._wholes.get(id(data.images), data)
                return part
        data = load_eval(source, predictor.image_size, limit, predictor.resize)
        self._splits.append((asked, limit, data))
        return data

    def images(
        self,
        predictor: Predictor,
        data: EvalSet,
        rows: np.ndarray | None = None,
        output: Output = "embedding",
    ) -> np.ndarray:
        """Embeddings of a split's pictures; see `embed_images`.

        Args:
          predictor: the model.
          data: from `split`.
          rows: [k] int, which pictures, ascending; None: all.
          output: as for `embed_images`.

        Returns:
          float32 [k, E], unit norm; of "pooled" [k, D], as they are.

        Raises:
          RunFailed: none of them decodes.
        """
        self._belong_to(predictor)
        rows = np.arange(len(data)) if rows is None else np.asarray(rows)
        data = self._wholes.get(id(data.images), data)  # a part's rows are the first of the whole's
        known = self._images.get((id(data.images), output))
        missing = rows if known is None else rows[~known[1][rows]]
        if known is None or len(missing):
            fresh = embed_images(predictor, data.images, missing, output)
            if known is None:
                table = np.zeros((len(data), fresh.shape[1]), np.float32)
                known = self._images[id(data.images), output] = table, np.zeros(len(data), bool)
            known[0][missing], known[1][missing] = fresh, True
        return known[0] if len(rows) == len(data) else known[0][rows]

    def texts(self, predictor: Predictor, tokens: np.ndarray) -> np.ndarray:
        """Embeddings of texts; equal ones are embedded once.

        Args:
          predictor: the model.
          tokens: int32 [n, L], from `Predictor.tokenize`.

        Returns:
          float32 [n, E], unit norm.
        """
        self._belong_to(predictor)
        rows = np.ascontiguousarray(tokens)
        marks = [hashlib.blake2b(row, digest_size=16).digest() for row in rows]
        place, first = self._places, []
        for i, mark in enumerate(marks):
            if mark not in place:
                place[mark] = len(place)
                first.append(i)
        if first or self._table is None:
            fresh = predictor.encode_text(rows[first] if len(first) < len(rows) else rows)
            known = self._table
            self._table = fresh if known is None else np.concatenate([known, fresh])
        index = np.array([place[mark] for mark in marks], np.int64)
        in_order = len(index) == len(self._table) and (index == np.arange(len(index))).all()
        return self._table if in_order else self._table[index]

    def _belong_to(self, predictor: Predictor) -> None:
        """Forgets what another model made."""
        if self._owner is None or self._owner() is not predictor:
            self._forget()
            self._owner = weakref.ref(predictor, lambda _: self._forget())

    def _forget(self) -> None:
        self._images, self._places, self._table = {}, {}, None
