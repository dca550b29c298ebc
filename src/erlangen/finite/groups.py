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
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ._closure import automorphisms, orbitals
from ._elements import Element as Element
from ._elements import is_int, read_generator, read_letters, say_order, shorten, write_element
from ._enumeration import CHUNK, classes_of, close_under_products, components, weigh

if TYPE_CHECKING:
    from .irreps import Irrep

MAX_ORDER = 50_000
MAX_TABLE_ORDER = 5_040
MAX_PAIR_DEGREE = 8_192


class PermutationGroup:
    """The finite group that some permutations of positions, with or without letters, generate.

    Two groups are equal if their generators are, in order, with the same letters. ``str(group)`` is read back by
    :func:`erlangen.finite.parse`.

    Attributes:
        degree: N, the number of positions.
        alphabet: the letters, or None if they have no names or there are none.
        num_letters: L, or 0 without letters.
        order: G, the number of elements.
        generators: as given, written out.
        generator_numbers: the number of each generator among the elements.
        name: as given, else the string that :func:`erlangen.finite.parse` reads.
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
            generators = "; ".join(write_element(g, self.alphabet) for g in self.generators)
            self._text = f"group({self.degree}{letters}: {generators})"
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
        return orbitals(self._rows_GW[:, : self.degree], self.orbits)

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
                f"{self!r}: the 2-closure has order {say_order(order)}, more than max_order {self.max_order}; make the "
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
                f"order {say_order(self._two_closure[0])}: pairwise attention on trivial channels respects that. "
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


def _rebuild(
    generators: Sequence, letters: str | int | None, max_order: int, name: str | None, text: str | None
) -> PermutationGroup:
    group = PermutationGroup(generators, letters, max_order=max_order, name=name)
    group._text = text
    return group
