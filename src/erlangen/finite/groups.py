"""Finite groups that permute the positions of a window, and with them the letters that stand there.

An element h moves the content of position i to position ``positions[i]`` and turns letter a, standing at position i,
into ``letters[a]`` (the same map everywhere) or ``letters[i][a]`` (a map a position). Reverse complement is the
reversal of positions *and* A↔T, C↔G. Products compose as maps do, (gh)(i) = g(h(i)), so that permutation matrices
multiply as the elements: P_h[positions[i], i] = 1 and P_gh = P_g P_h.

Elements are numbered: 0 is the identity, and the others follow breadth first from the generators, multiplied from the
left, so that the numbering depends on the generators alone. All elements are listed when the group is made. A group of
order G on N positions is one array [G, N] of small integers; no [N, N] or [G, G] array is made unless asked for.

Shapes: G order, N positions (``degree``), L letters.
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ._elements import Element as Element
from ._elements import is_int, read_generator, read_letters, shorten
from ._enumeration import CHUNK, automorphisms, classes_of, close_under_products, components, cycles_of, weigh

if TYPE_CHECKING:
    from .irreps import Irrep

MAX_ORDER = 50_000
MAX_TABLE_ORDER = 5_040
MAX_PAIR_DEGREE = 8_192


class PermutationGroup:
    """The finite group that some permutations of positions, with or without letters, generate.

    Two groups are equal if their generators are, in order, with the same letters. ``str(group)`` is read back by
    :func:`parse`.

    Attributes:
        degree: N, the number of positions.
        alphabet: the letters, or None if they have no names or there are none.
        num_letters: L, or 0 without letters.
        order: G, the number of elements.
        generators: as given, written out.
        generator_numbers: the number of each generator among the elements.
        name: as given, else the string that :func:`parse` reads.
    """

    def __init__(
        self,
        generators: Sequence[Any],
        letters: str | int | None = None,
        *,
        max_order: int = MAX_ORDER,
        name: str | None = None,
    ):
        """List the group.

        Args:
            generators: each is the sequence of places where positions 0, 1, ... go, or a pair (positions, letters).
                ``letters`` of a pair is None (letters stay), the letters' images in order, as integers or, with an
                alphabet, as a string (``"TGCA"`` is the complement over ``"ACGT"``), or a mapping of those letters
                that change (``{"A": "T", "T": "A"}``); or a sequence with one of these for each position.
            letters: the alphabet, or the number of letters, or None.
            max_order: the largest order to list.
            name: shown by ``repr``.

        Raises:
            ValueError: a generator is not a permutation, generators differ in length, letters are outside the alphabet
                or are not permuted, or the group is larger than ``max_order`` or than 256 MiB.
        """
        self.alphabet, self.num_letters = read_letters(letters)
        if isinstance(generators, str | Mapping) or not len(generators):
            raise ValueError(
                f"PermutationGroup: generators is a sequence of one permutation or more, received {generators!r}; "
                "for the trivial group give the identity, [range(n)]"
            )
        self.generators = tuple(read_generator(g, k, self.alphabet, self.num_letters) for k, g in enumerate(generators))
        self.degree = len(self.generators[0].positions)
        lengths = [len(g.positions) for g in self.generators]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"PermutationGroup: all generators permute the same positions, received generators of lengths {lengths}"
            )
        if not is_int(max_order) or max_order < 1:
            raise ValueError(f"PermutationGroup: max_order is an integer, at least 1, received {max_order!r}")
        self.max_order = int(max_order)
        self._text: str | None = None
        self._name = name
        self._letters_vary = any(g.letters and isinstance(g.letters[0], tuple) for g in self.generators)
        rows_GW, self._left_SG, self._parents = close_under_products(
            [self._row(g) for g in self.generators], self.degree, self.num_letters, max_order
        )
        self._rows_GW = rows_GW
        self.order = len(rows_GW)
        self.generator_numbers = tuple(int(left_G[0]) for left_G in self._left_SG)

    # --- text and identity -----------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self._name or str(self)

    def __str__(self) -> str:
        if self._text is None:
            letters = "" if not self.num_letters else f", {json.dumps(self.alphabet or self.num_letters)}"
            self._text = f"group({self.degree}{letters}: {'; '.join(map(self._generator_text, self.generators))})"
        return self._text

    def __repr__(self) -> str:
        letters = f", {self.num_letters} letters" if self.num_letters else ""
        return f"<PermutationGroup {shorten(self.name, 80)}: order {self.order}, {self.degree} positions{letters}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PermutationGroup) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __reduce__(self) -> tuple:
        return _rebuild, (self.generators, self.alphabet or self.num_letters, self.max_order, self._name, self._text)

    def __copy__(self) -> "PermutationGroup":
        return self

    def __deepcopy__(self, memo: dict) -> "PermutationGroup":
        return self  # it never changes, and modules that hold it are copied

    @property
    def _identity(self) -> tuple:
        return self.generators, self.alphabet, self.num_letters

    def _generator_text(self, generator: Element) -> str:
        def text(letter_map: Any) -> str | list[int]:
            return "".join(self.alphabet[a] for a in letter_map) if self.alphabet else list(letter_map)

        cycles = "".join(f"({' '.join(map(str, cycle))})" for cycle in cycles_of(generator.positions)) or "()"
        letters = generator.letters
        if letters is None or letters == tuple(range(self.num_letters)):
            return cycles
        nested = isinstance(letters[0], tuple)
        return f"{cycles} {json.dumps([text(m) for m in letters] if nested else text(letters))}"

    # --- elements --------------------------------------------------------------------------------------------------

    @cached_property
    def elements(self) -> tuple[Element, ...]:
        """All elements in the order of their numbers. G N Python integers: ``positions`` is more frugal."""
        return tuple(self.element(h) for h in range(self.order))

    def element(self, h: int) -> Element:
        """The element of a number, written out."""
        row_W = self._rows_GW[self._index(h)]
        positions, letters = row_W[: self.degree].tolist(), None
        if self.num_letters:
            maps = row_W[self.degree :].reshape(-1, self.num_letters)
            same = (maps == maps[0]).all()
            letters = tuple(maps[0].tolist()) if same else tuple(map(tuple, maps.tolist()))
        return Element(tuple(positions), letters)

    @cached_property
    def positions(self) -> np.ndarray:
        """Where each element sends each position: int64 [G, N]."""
        return self._rows_GW[:, : self.degree].astype(np.int64)

    @cached_property
    def letter_maps(self) -> np.ndarray | None:
        """What each element makes of each letter at each position: int64 [G, N, L]; None without letters."""
        if not self.num_letters:
            return None
        maps = self._rows_GW[:, self.degree :].reshape(self.order, -1, self.num_letters)
        return np.ascontiguousarray(np.broadcast_to(maps, (self.order, self.degree, self.num_letters)), dtype=np.int64)

    @cached_property
    def points(self) -> np.ndarray:
        """The faithful action on points (position i, letter a), numbered i L + a: int64 [G, N max(L, 1)]."""
        maps = self.letter_maps
        if maps is None:
            return self.positions
        return (self.positions[:, :, None] * self.num_letters + maps).reshape(self.order, -1)

    def position_map(self, h: int | Element) -> np.ndarray:
        """Where one element sends each position: int64 [N]."""
        return self._rows_GW[self._index(h), : self.degree].astype(np.int64)

    def letter_map(self, h: int | Element) -> np.ndarray | None:
        """What one element makes of each letter at each position: int64 [N, L]; None without letters."""
        return self._maps_NL(h) if self.num_letters else None

    def point_map(self, h: int | Element) -> np.ndarray:
        """Where one element sends each point i L + a: int64 [N max(L, 1)]."""
        positions_N, maps_NL = self.position_map(h), self.letter_map(h)
        return positions_N if maps_NL is None else (positions_N[:, None] * self.num_letters + maps_NL).ravel()

    def number(self, element: Any) -> int:
        """The number of an element, written as generators are.

        Raises:
            ValueError: it is no permutation of these positions and letters, or not in the group.
        """
        element = read_generator(element, None, self.alphabet, self.num_letters)
        varies = bool(element.letters) and isinstance(element.letters[0], tuple)
        if len(element.positions) == self.degree and (self._letters_vary or not varies):
            row_W = self._row(element)
            found = int(self._find(self._image(row_W[None], np.zeros(1, np.int64)[:, None], self._base)[0]))
            if (self._rows_GW[found] == row_W).all():
                return found
        raise ValueError(f"{self!r} does not contain {element}")

    # --- products --------------------------------------------------------------------------------------------------

    def multiply(self, a: Any, b: Any) -> Any:
        """The number of the product ab, which does b first; arrays of numbers broadcast.

        Raises:
            ValueError: a number outside 0 ... G - 1.
        """
        a, b = self._numbers(a), self._numbers(b)
        if "table" in self.__dict__:
            product = self.table[a, b]
        else:
            product = self._find(self._image(self._rows_GW, a[..., None], self._base_images_GR[b]))
        return int(product) if product.ndim == 0 else product.astype(np.int64)

    def inverse(self, a: Any) -> Any:
        """The number of the inverse; of an array, the array of them."""
        inverse = self._inverses_G[self._numbers(a)]
        return int(inverse) if inverse.ndim == 0 else inverse

    @cached_property
    def table(self) -> np.ndarray:
        """The multiplication table, ``table[a, b] = multiply(a, b)``: int32 [G, G].

        Raises:
            ValueError: the order is above 5,040.
        """
        if self.order > MAX_TABLE_ORDER:
            raise ValueError(
                f"{self!r}: a multiplication table is made up to order {MAX_TABLE_ORDER}; use multiply(a, b)"
            )
        table_GG = np.empty((self.order, self.order), np.int32)
        table_GG[0] = np.arange(self.order)
        for h, (generator, parent) in enumerate(self._parents[1:], start=1):
            np.take(self._left_SG[generator], table_GG[parent], out=table_GG[h])
        return table_GG

    @cached_property
    def _right_SG(self) -> np.ndarray:
        """The number of h s for each generator s and element h."""
        return np.stack([self.multiply(np.arange(self.order), s) for s in self.generator_numbers])

    @cached_property
    def _inverses_G(self) -> np.ndarray:
        undo_SG = np.argsort(self._right_SG, axis=1)  # of h, the number of h s⁻¹
        inverses = np.zeros(self.order, np.int64)
        for h, (generator, parent) in enumerate(self._parents[1:], start=1):
            inverses[h] = undo_SG[generator, inverses[parent]]  # (s p)⁻¹ = p⁻¹ s⁻¹
        return inverses

    # --- structure -------------------------------------------------------------------------------------------------

    @cached_property
    def orbits(self) -> tuple[np.ndarray, ...]:
        """The positions that the group carries into each other, each orbit sorted, in the order of their first."""
        return classes_of(self._rows_GW[:, : self.degree].min(0))

    @cached_property
    def conjugacy_classes(self) -> tuple[np.ndarray, ...]:
        """Arrays of numbers: the identity's class, then by size, then by smallest number."""
        undo_SG = np.argsort(self._right_SG, axis=1)
        conjugates = [left_G[undo_G] for left_G, undo_G in zip(self._left_SG, undo_SG)]  # s h s⁻¹
        return tuple(sorted(classes_of(components(conjugates)), key=lambda c: (c[0] != 0, len(c), c[0])))

    @cached_property
    def class_of(self) -> np.ndarray:
        """The class of each element, an index into ``conjugacy_classes``: int64 [G]."""
        class_of_G = np.empty(self.order, np.int64)
        for k, numbers in enumerate(self.conjugacy_classes):
            class_of_G[numbers] = k
        return class_of_G

    @cached_property
    def element_orders(self) -> np.ndarray:
        """The least k > 0 with h^k = 1, of each element: int64 [G]."""
        representatives = np.array([numbers[0] for numbers in self.conjugacy_classes])
        orders = np.ones(len(representatives), np.int64)
        for point in self._base:  # h^k = 1 if it fixes the base, so k is a multiple of the lengths of these cycles
            length = np.zeros(len(representatives), np.int64)
            active, image, steps = np.arange(len(representatives)), np.full(len(representatives), point), 0
            while len(active):
                steps += 1
                image = self._image(self._rows_GW, representatives[active], image)
                back = image == point
                length[active[back]] = steps
                active, image = active[~back], image[~back]
            orders = np.lcm(orders, length)
        return orders[self.class_of]

    @cached_property
    def is_abelian(self) -> bool:
        numbers = np.array(self.generator_numbers)
        return bool((self.multiply(numbers[:, None], numbers) == self.multiply(numbers, numbers[:, None])).all())

    @property
    def is_transitive(self) -> bool:
        """Whether every position can be carried to every other."""
        return len(self.orbits) == 1

    def permutation_character(self, *, letters: bool = False) -> np.ndarray:
        """The number of fixed positions, or with ``letters`` of fixed points, of each conjugacy class: int64."""
        representatives = [int(numbers[0]) for numbers in self.conjugacy_classes]
        maps = [self.point_map(h) if letters else self.position_map(h) for h in representatives]
        return np.array([int((points == np.arange(len(points))).sum()) for points in maps])

    # --- pairs of positions ----------------------------------------------------------------------------------------

    @cached_property
    def _orbitals_NN(self) -> np.ndarray:
        if self.degree > MAX_PAIR_DEGREE:
            raise ValueError(
                f"{self!r}: orbits of pairs are a matrix, positions by positions; at most {MAX_PAIR_DEGREE} of them"
            )
        positions_GN = self._rows_GW[:, : self.degree]
        labels_NN = np.empty((self.degree, self.degree), np.int32)
        number = 0
        for orbit in self.orbits:
            images_G = positions_GN[:, orbit[0]]
            lowest, row_N = np.unique(positions_GN[images_G == orbit[0]].min(0), return_inverse=True)
            for image, h in zip(*np.unique(images_G, return_index=True)):
                labels_NN[image, positions_GN[h]] = number + row_N
            number += len(lowest)
        return labels_NN

    def orbitals(self) -> np.ndarray:
        """Labels of the orbits on ordered pairs of positions: int32 [N, N], equal where an element carries (i, j) to
        (k, l); labels are 0, 1, ..., in the order of first positions.

        Raises:
            ValueError: more than 8,192 positions.
        """
        return self._orbitals_NN.copy()

    @cached_property
    def _two_closure(self) -> tuple[int, list[np.ndarray]]:
        return automorphisms(self._orbitals_NN, self._rows_GW[:, : self.degree])

    def two_closure(self) -> "PermutationGroup":
        """The largest group of permutations of the positions with the same orbits on pairs, without letters.

        Pairwise attention (scores of query and key plus a bias of the pair) that respects this group respects all of
        its 2-closure: with trivial channels it cannot tell them apart. Wielandt, Permutation groups through invariant
        relations and invariant functions, 1969.

        Raises:
            ValueError: the 2-closure is larger than ``max_order``, more than 8,192 positions, or the search is too
                long.
        """
        order, found = self._two_closure
        if order > max(self.max_order, self.order):
            raise ValueError(
                f"{self!r}: the 2-closure has order {_count(order)}, more than max_order {self.max_order}; make the "
                "group with a larger max_order"
            )
        own = [g.positions for g in self.generators]
        return PermutationGroup([*own, *(p.tolist() for p in found)], max_order=max(self.max_order, self.order))

    @cached_property
    def is_two_closed(self) -> bool:
        """Whether the positions are moved as by the whole 2-closure."""
        return self._two_closure[0] == self._num_position_maps

    @cached_property
    def _num_position_maps(self) -> int:
        """The order of the group of position permutations; smaller than G if some elements change only letters."""
        still = (self._rows_GW[:, : self.degree] == np.arange(self.degree)).all(1)
        return self.order // int(still.sum())

    def check_two_closed(self) -> bool:
        """``is_two_closed``, with a ``UserWarning`` that names both orders if not."""
        if not self.is_two_closed:
            warnings.warn(
                f"{self!r} permutes positions as a group of order {self._num_position_maps}, but its 2-closure has "
                f"order {_count(self._two_closure[0])}: pairwise attention on trivial channels respects that. "
                "Give the channels or the heads a non-trivial representation to break it down.",
                UserWarning,
                stacklevel=2,
            )
        return self.is_two_closed

    # --- action ----------------------------------------------------------------------------------------------------

    def permute(self, h: int | Element, x: Tensor, dim: int = -2) -> Tensor:
        """Move the content of position i to h(i), along ``dim`` of length N: P_h x for x [..., N, D].

        Raises:
            ValueError: ``x`` has not N entries along ``dim``, or there is no such element.
        """
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != self.degree:
            raise ValueError(f"{self!r}.permute: dim {dim} has {self.degree} positions, received {list(x.shape)}")
        source = torch.from_numpy(np.argsort(self.position_map(h))).to(x.device)
        return x.index_select(dim, source)

    def act_on_tokens(self, h: int | Element, tokens: Tensor) -> Tensor:
        """Move and change letters: integers [..., N] -> [..., N]. Without letters, tokens are moved as they are.

        Raises:
            ValueError: not N tokens, not integers, or letters outside 0 ... L - 1.
        """
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(f"{self!r}.act_on_tokens: tokens are integers, received {tokens.dtype}")
        if tokens.shape[-1:] != (self.degree,):
            raise ValueError(f"{self!r}.act_on_tokens: tokens are [..., {self.degree}], received {list(tokens.shape)}")
        maps_NL = self.letter_map(h)
        if maps_NL is not None:
            if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.num_letters:
                raise ValueError(
                    f"{self!r}.act_on_tokens: letters are 0 to {self.num_letters - 1}, received "
                    f"{int(tokens.min())} to {int(tokens.max())}; add a letter for padding or for unknown ones"
                )
            maps = torch.from_numpy(maps_NL).to(tokens.device)
            positions = torch.arange(self.degree, device=tokens.device)
            tokens = maps[positions, tokens.long()].to(tokens.dtype)
        return self.permute(h, tokens, -1)

    def act_on_onehot(self, h: int | Element, x: Tensor) -> Tensor:
        """Move and change letters: [..., N, L] -> [..., N, L], of one-hot letters, profiles or logits.

        Raises:
            ValueError: a shape other than [..., N, L], or a group without letters.
        """
        if not self.num_letters or x.shape[-2:] != (self.degree, self.num_letters):
            raise ValueError(
                f"{self!r}.act_on_onehot: x is [..., {self.degree} positions, {self.num_letters} letters], received "
                f"{list(x.shape)}" + ("" if self.num_letters else "; without letters use permute")
            )
        source = torch.from_numpy(np.argsort(self.point_map(h))).to(x.device)
        return x.flatten(-2).index_select(-1, source).unflatten(-1, (self.degree, self.num_letters))

    def translate(self, h: int | Element, text: str) -> str:
        """Move and change the letters of a string of length N over the alphabet: "GATT" -> "AATC" by reverse
        complement. Without an alphabet, characters are moved as they are.

        Raises:
            ValueError: a wrong length, a letter outside the alphabet, or letters without names.
        """
        if len(text) != self.degree:
            raise ValueError(f"{self!r}.translate: a string has {self.degree} letters, received {len(text)}")
        if self.alphabet is None:
            if self.num_letters:
                raise ValueError(f"{self!r}.translate: its letters are numbers; use act_on_tokens")
            letters = list(text)
        else:
            outside = sorted(set(text) - set(self.alphabet))
            if outside:
                raise ValueError(f"{self!r}.translate: {''.join(outside)!r} is outside the alphabet {self.alphabet!r}")
            maps_NL = self._maps_NL(h)
            letters = [self.alphabet[maps_NL[i, self.alphabet.index(a)]] for i, a in enumerate(text)]
        return "".join(letters[i] for i in np.argsort(self.position_map(h)))

    # --- representations -------------------------------------------------------------------------------------------

    @cached_property
    def irreps(self) -> "tuple[Irrep, ...]":
        """All real irreducible representations: see :func:`erlangen.finite.irreps.real_irreps`."""
        from .irreps import real_irreps

        return real_irreps(self)

    def channels(self, letters: bool = False) -> "tuple[Irrep, ...]":
        """The irreps that occur in the action on positions, or with ``letters`` on (position, letter) points."""
        fixed = self.permutation_character(letters=letters)
        sizes = np.array([len(numbers) for numbers in self.conjugacy_classes])
        return tuple(irrep for irrep in self.irreps if (sizes * fixed * irrep.character).sum() > 0.5 * self.order)

    def projectors(self, dtype: torch.dtype = torch.float64, letters: bool = False) -> Tensor:
        """The orthogonal projectors onto the channels: [len(channels), n, n], n = N, or N L with ``letters``."""
        from .projectors import projectors

        return projectors(self, dtype=dtype, letters=letters)

    # --- inside ----------------------------------------------------------------------------------------------------
    # An element is a row [W]: its positions [N], then its letters, [L] or one map a position [N L]. The group permutes
    # the W columns; it is known by its images of a base, a few columns that only the identity leaves in place.

    def _row(self, element: Element) -> np.ndarray:
        letters = element.letters or ()
        if self._letters_vary and not (letters and isinstance(letters[0], tuple)):
            letters = (letters,) * self.degree
        return np.concatenate([np.array(element.positions), np.array(letters, dtype=np.int64).ravel()])

    def _maps_NL(self, h: int | Element) -> np.ndarray:
        maps = self._rows_GW[self._index(h), self.degree :].reshape(-1, self.num_letters)
        return np.ascontiguousarray(np.broadcast_to(maps, (self.degree, self.num_letters)), dtype=np.int64)

    def _image(self, rows: np.ndarray, h: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The columns to which elements, by their index into ``rows``, send columns; both broadcast."""
        images = rows[h, columns].astype(np.int64)
        if not self.num_letters:
            return images
        is_letter = columns >= self.degree
        if not self._letters_vary:
            return images + self.degree * is_letter
        position = np.where(is_letter, columns - self.degree, 0) // self.num_letters
        return images + is_letter * (self.degree + self.num_letters * rows[h, position].astype(np.int64))

    @cached_property
    def _base(self) -> np.ndarray:
        base, stabiliser = [], np.arange(self.order)
        while len(stabiliser) > 1:
            sample = stabiliser[: max(2, CHUNK // self._rows_GW.shape[1])]
            column = int((self._rows_GW[sample] != self._rows_GW[0]).sum(0).argmax())
            base.append(column)
            stabiliser = stabiliser[self._image(self._rows_GW, stabiliser, np.array(column)) == column]
        return np.array(base, dtype=np.int64)

    @cached_property
    def _base_images_GR(self) -> np.ndarray:
        return self._image(self._rows_GW, np.arange(self.order)[:, None], self._base)

    @cached_property
    def _keys(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights [R, W] of images of the base whose sums tell all elements apart; the sums, sorted; their order."""
        for seed in range(64):
            weights_RW = np.random.default_rng(seed).integers(
                2**64, size=(len(self._base), self._rows_GW.shape[1]), dtype=np.uint64
            )
            keys_G = weigh(weights_RW, self._base_images_GR)
            order_G = np.argsort(keys_G)
            keys_G = keys_G[order_G]
            if (keys_G[1:] != keys_G[:-1]).all():
                return weights_RW, keys_G, order_G
        raise AssertionError("64 random keys collided")

    def _find(self, images: np.ndarray) -> np.ndarray:
        """The numbers of the elements of the group that have these images of the base: [..., R] -> [...]."""
        weights_RW, keys_G, order_G = self._keys
        return order_G[np.searchsorted(keys_G, weigh(weights_RW, images)).clip(max=self.order - 1)]

    def _numbers(self, numbers: Any) -> np.ndarray:
        """Numbers of elements as an array of int64, once they are known to be some."""
        numbers = np.asarray(numbers)
        if numbers.dtype.kind not in "iu" or (
            numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.order
        ):
            raise ValueError(f"{self!r}: elements are numbered 0 to {self.order - 1}, received {numbers.tolist()}")
        return numbers.astype(np.int64, copy=False)

    def _index(self, h: int | Element) -> int:
        if isinstance(h, tuple):
            return self.number(h)
        number = self._numbers(h)
        if number.ndim:
            raise ValueError(f"{self!r}: expected one element, by its number or written out, received {h!r}")
        return int(number)


# --- named groups --------------------------------------------------------------------------------------------------


def cyclic(n: int) -> PermutationGroup:
    """Rotations of n positions in a ring, order n: the generator sends i to i + 1."""
    _require_size("cyclic", n)
    return _named(f"cyclic({n})", [_rotation(n)])


def dihedral(n: int) -> PermutationGroup:
    """Rotations and reflections of n ≥ 3 positions in a ring, order 2n: the shift by one and the reversal."""
    if _require_size("dihedral", n) < 3:
        raise ValueError(
            f"dihedral(n) acts faithfully on n ≥ 3 positions, received {n}; use reversal(2) for order 2, or klein() "
            "for the dihedral group of order 4"
        )
    return _named(f"dihedral({n})", [_rotation(n), _reversal(n)])


def symmetric(n: int, *, max_order: int = MAX_ORDER) -> PermutationGroup:
    """All permutations of n positions, order n!: the shift by one and the swap of the first two."""
    _require_size("symmetric", n)
    _require_order(f"symmetric({n})", math.factorial(n), max_order)
    swap = [1, 0, *range(2, n)] if n > 1 else [0]
    return _named(f"symmetric({n})", [_rotation(n), swap] if n > 2 else [swap], max_order=max_order)


def alternating(n: int, *, max_order: int = MAX_ORDER) -> PermutationGroup:
    """All even permutations of n positions, order n!/2."""
    _require_size("alternating", n)
    _require_order(f"alternating({n})", max(1, math.factorial(n) // 2), max_order)
    if n < 3:
        generators = [list(range(n))]
    else:
        fixed = 1 - n % 2  # the cycle of an odd number of positions is even
        cycle = [*range(fixed), *(fixed + i for i in _rotation(n - fixed))]
        generators = [[1, 2, 0, *range(3, n)], cycle] if n > 3 else [[1, 2, 0]]
    return _named(f"alternating({n})", generators, max_order=max_order)


def reversal(n: int) -> PermutationGroup:
    """The window read backwards, order 2 (1 for n = 1); letters stay. See ``reverse_complement`` for DNA."""
    _require_size("reversal", n)
    return _named(f"reversal({n})", [_reversal(n)])


def klein() -> PermutationGroup:
    """Klein's four-group on 4 positions, regular: (0 1)(2 3) and (0 2)(1 3)."""
    return _named("klein()", [[1, 0, 3, 2], [2, 3, 0, 1]])


def quaternion() -> PermutationGroup:
    """The quaternion group on 8 positions 1, i, j, k, -1, -i, -j, -k, regular: multiplication by i and by j."""
    return _named("quaternion()", [[1, 4, 3, 6, 5, 0, 7, 2], [2, 7, 4, 1, 6, 3, 0, 5]])


def reverse_complement(length: int, alphabet: str = "ACGT") -> PermutationGroup:
    """The other strand: order reversed and letters complemented, order 2.

    Args:
        length: number of positions.
        alphabet: letters of DNA or RNA, upper or lower case, with IUPAC's ambiguity codes and ``-`` if wanted.

    Raises:
        ValueError: a letter without a complement in the alphabet.
    """
    _require_size("reverse_complement", length, "length")
    complement = _complement("reverse_complement", alphabet)
    extra = "" if alphabet == "ACGT" else f", {json.dumps(alphabet)}"
    return _named(f"reverse_complement({length}{extra})", [(_reversal(length), complement)], alphabet)


def inverted_repeat(arm: int, spacer: int, alphabet: str = "ACGT") -> PermutationGroup:
    """Two arms that are each other's reverse complement around a spacer that stays as it is, order 2.

    Args:
        arm: number of positions of one arm.
        spacer: number of positions between the arms: neither moved nor complemented.
        alphabet: as in :func:`reverse_complement`.

    Raises:
        ValueError: no arm, a negative spacer, or a letter without a complement in the alphabet.
    """
    _require_size("inverted_repeat", arm, "arm")
    _require_size("inverted_repeat", spacer, "spacer", least=0)
    complement = _complement("inverted_repeat", alphabet)
    n = 2 * arm + spacer
    in_spacer = [arm <= i < arm + spacer for i in range(n)]
    positions = [i if in_spacer[i] else n - 1 - i for i in range(n)]
    letters = [alphabet if in_spacer[i] else complement for i in range(n)]
    extra = "" if alphabet == "ACGT" else f", {json.dumps(alphabet)}"
    return _named(f"inverted_repeat({arm}, {spacer}{extra})", [(positions, letters)], alphabet)


def direct_product(a: PermutationGroup, b: PermutationGroup, *, max_order: int = MAX_ORDER) -> PermutationGroup:
    """Both groups on a grid: position (i, j), numbered i b.degree + j, goes to (a's image of i, b's image of j).

    Letters are changed by the one, or by both if they have the same letters and change them in ways that commute.

    Raises:
        ValueError: different letters, changes of letters that do not commute or not independent, or too large.
    """
    _require_groups("direct_product", a, b)
    text = f"direct_product({a}, {b})"
    if a.num_letters and b.num_letters and (a.alphabet, a.num_letters) != (b.alphabet, b.num_letters):
        raise ValueError(
            f"direct_product: both groups change the same letters, received {a.alphabet or a.num_letters!r} and "
            f"{b.alphabet or b.num_letters!r}"
        )
    _require_order(text, a.order * b.order, max_order)
    source = a if a.num_letters else b
    generators = []
    for group, first in ((a, True), (b, False)):
        for g in group.generators:
            positions, maps = np.array(g.positions), group.letter_map(group.number(g))
            i, j = np.divmod(np.arange(a.degree * b.degree), b.degree)
            moved = positions[i] * b.degree + j if first else i * b.degree + positions[j]
            letters = None if maps is None else maps[i if first else j].tolist()
            generators.append((moved.tolist(), letters))
    product = _named(text, generators, source.alphabet or source.num_letters, max_order=max_order)
    numbers_a = np.array(product.generator_numbers[: len(a.generators)])
    numbers_b = np.array(product.generator_numbers[len(a.generators) :])
    commute = product.multiply(numbers_a[:, None], numbers_b) == product.multiply(numbers_b, numbers_a[:, None])
    if product.order != a.order * b.order or not commute.all():
        raise ValueError(
            f"direct_product: the two groups change letters in ways that do not commute or are not independent: "
            f"together they make order {product.order}, not {a.order} x {b.order}"
        )
    return product


def wreath_product(a: PermutationGroup, b: PermutationGroup, *, max_order: int = MAX_ORDER) -> PermutationGroup:
    """b permutes blocks, and a acts in each block on its own: order a.order^b.degree b.order.

    Position i of block j is number j a.degree + i. Letters, if any, are a's.

    Raises:
        ValueError: b has letters, or the product is too large.
    """
    _require_groups("wreath_product", a, b)
    text = f"wreath_product({a}, {b})"
    if b.num_letters:
        raise ValueError(f"wreath_product: b permutes blocks and has no letters of its own, received {b!r}")
    _require_order(text, a.order**b.degree * b.order, max_order)
    n = a.degree * b.degree
    stay = np.arange(a.num_letters)
    generators = []
    for orbit in b.orbits:  # a acts in one block of each orbit, b carries it to the others
        block = slice(int(orbit[0]) * a.degree, (int(orbit[0]) + 1) * a.degree)
        for g in a.generators:
            positions = np.arange(n)
            positions[block] = block.start + np.array(g.positions)
            letters = None
            if a.num_letters:
                letters = np.tile(stay, (n, 1))
                letters[block] = a._maps_NL(a.number(g))
                letters = letters.tolist()
            generators.append((positions.tolist(), letters))
    j, i = np.divmod(np.arange(n), a.degree)
    generators += [((np.array(g.positions)[j] * a.degree + i).tolist(), None) for g in b.generators]
    return _named(text, generators, a.alphabet or a.num_letters, max_order=max_order)


_NAMED: dict[str, Callable[..., PermutationGroup]] = {
    function.__name__: function
    for function in (
        cyclic,
        dihedral,
        symmetric,
        alternating,
        reversal,
        klein,
        quaternion,
        reverse_complement,
        inverted_repeat,
        direct_product,
        wreath_product,
    )
}


def parse(text: str) -> PermutationGroup:
    """The group of a string, as ``str`` writes it: a named group, ``"wreath_product(cyclic(2), symmetric(3))"``, or
    generators as cycles, with their letters: ``'group(4, "ACGT": (0 3)(1 2) "TGCA"; (0 2)(1 3))'``.

    Raises:
        ValueError: the string is not of this form, or the group refuses its arguments.
    """
    if not isinstance(text, str):
        raise ValueError(f"parse: text is a string, received {text!r}")
    reader = _Reader(text)
    group = reader.group()
    reader.end()
    return group


class _Reader:
    """Reads a group from left to right."""

    def __init__(self, text: str):
        self.text = text
        self.place = 0

    def fail(self, expected: str) -> ValueError:
        return ValueError(
            f"parse({self.text!r}): expected {expected} at character {self.place}, received "
            f"{self.text[self.place : self.place + 20]!r}; named groups are {', '.join(_NAMED)}, others are written "
            "'group(3: (0 1 2); (0 1))'"
        )

    def peek(self) -> str:
        while self.text[self.place : self.place + 1].isspace():
            self.place += 1
        return self.text[self.place : self.place + 1]

    def take(self, symbol: str) -> bool:
        if found := self.peek() == symbol:
            self.place += 1
        return found

    def require(self, symbol: str) -> None:
        if not self.take(symbol):
            raise self.fail(repr(symbol))

    def word(self, accept: Callable[[str], bool]) -> str:
        self.peek()
        start = self.place
        while self.place < len(self.text) and accept(self.text[self.place]):
            self.place += 1
        return self.text[start : self.place]

    def integer(self) -> int:
        digits = self.word(lambda c: c in "0123456789")
        if not digits:
            raise self.fail("a number")
        return int(digits)

    def value(self) -> Any:
        """A JSON string or list."""
        self.peek()
        try:
            value, self.place = json.JSONDecoder().raw_decode(self.text, self.place)
        except json.JSONDecodeError:
            raise self.fail("a string or a list of letters") from None
        return value

    def end(self) -> None:
        if self.peek():
            raise self.fail("the end")

    def group(self) -> PermutationGroup:
        start = self.place
        name = self.word(lambda c: c.isalpha() or c == "_")
        if name != "group" and name not in _NAMED:
            self.place = start
            raise self.fail("the name of a group")
        self.require("(")
        if name == "group":
            return self.generated()
        arguments = []
        while not self.take(")"):
            if arguments and not self.take(","):
                raise self.fail("',' or ')'")
            character = self.peek()
            arguments.append(
                self.integer() if character.isdigit() else self.value() if character == '"' else self.group()
            )
        try:
            return _NAMED[name](*arguments)
        except TypeError:
            raise ValueError(f"parse({self.text!r}): {name} does not take the arguments {arguments}") from None

    def generated(self) -> PermutationGroup:
        degree = self.integer()
        letters = None
        if self.take(","):
            letters = self.value() if self.peek() == '"' else self.integer()
        self.require(":")
        generators = [self.generator(degree)]
        while self.take(";"):
            generators.append(self.generator(degree))
        self.require(")")
        return PermutationGroup(generators, letters)

    def generator(self, degree: int) -> tuple[list[int], Any]:
        positions = list(range(degree))
        self.require("(")
        seen: set[int] = set()
        while True:
            cycle = []
            while not self.take(")"):
                cycle.append(self.integer())
            if len(set(cycle)) < len(cycle) or seen & set(cycle) or any(i >= degree for i in cycle):
                raise self.fail(f"disjoint cycles of positions 0 to {degree - 1}, before the cycle that ended")
            seen |= set(cycle)
            for here, there in zip(cycle, [*cycle[1:], *cycle[:1]]):
                positions[here] = there
            if not self.take("("):
                return positions, self.value() if self.peek() in ('"', "[") and self.peek() else None


def _require_size(name: str, n: Any, parameter: str = "n", least: int = 1) -> int:
    if not is_int(n) or n < least:
        raise ValueError(f"{name}: {parameter} is an integer, at least {least}, received {n!r}")
    return int(n)


def _count(order: int) -> str:
    return str(order) if order < 10**15 else f"about 10^{math.log10(order):.0f}"


def _require_order(text: str, order: int, max_order: int) -> None:
    if order > max_order:
        raise ValueError(f"{shorten(text)}: the order is {_count(order)}, more than max_order {max_order}")


def _require_groups(name: str, *groups: Any) -> None:
    for group in groups:
        if not isinstance(group, PermutationGroup):
            raise ValueError(f"{name}: takes two groups, received {group!r}")


_COMPLEMENTS: dict[str, str] = dict(zip("ACGTRYKMBVDHSWN-", "TGCAYRMKVBHDSWN-"))


def _complement(name: str, alphabet: Any) -> str:
    """The complements of the letters, in order."""
    if not isinstance(alphabet, str):
        raise ValueError(f"{name}: alphabet is a string such as 'ACGT', received {alphabet!r}")
    images = []
    for letter in alphabet:
        image = "A" if letter in "Uu" else _COMPLEMENTS.get(letter.upper(), "")
        if image == "T" and "U" in alphabet.upper():
            image = "U"
        image = image.lower() if letter.islower() else image
        if not image or image not in alphabet:
            raise ValueError(
                f"{name}: {letter!r} has no complement in the alphabet {alphabet!r}; for pairs of your own say "
                "PermutationGroup([(positions, {'A': 'T', 'T': 'A'})], letters=alphabet)"
            )
        if image in images:
            raise ValueError(f"{name}: two letters of the alphabet {alphabet!r} have the complement {image!r}")
        images.append(image)
    return "".join(images)


def _rotation(n: int) -> list[int]:
    return [(i + 1) % n for i in range(n)]


def _reversal(n: int) -> list[int]:
    return list(range(n - 1, -1, -1))


def _named(text: str, generators: Sequence, letters: str | int | None = None, **options: Any) -> PermutationGroup:
    group = PermutationGroup(generators, letters, **options)
    group._text = text
    return group


def _rebuild(
    generators: Sequence, letters: str | int | None, max_order: int, name: str | None, text: str | None
) -> PermutationGroup:
    group = PermutationGroup(generators, letters, max_order=max_order, name=name)
    group._text = text
    return group
