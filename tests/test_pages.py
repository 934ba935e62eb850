"""The page pool against a model of sets and dicts, and every refusal."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer import tier
from jaxinfer.pages import (
    allocate,
    check,
    create,
    find,
    fork,
    numbers,
    page_keys,
    pages_for,
    publish,
    release,
    share,
)

PAGE = 4


def ids(*pages):
    return np.array(pages, np.int32)


class Model:
    """What a pool must do, one page at a time."""

    def __init__(self, num_pages, host_slots):
        self.host_slots, self.due = host_slots, set()  # keys of slots with copies due
        self.host = []  # keys of what the host holds, the next to go first
        self.moves = []  # of each page that is to be stored or loaded, its key
        self.held = []  # pages of each sequence
        self.blank = list(range(num_pages - 1, 0, -1))  # granted from the end on
        self.known = {}  # key -> page
        self.order = []  # pages known and not held, the next to go first

    def holders(self, page):
        return sum(page in pages for pages in self.held)

    def key_of(self, page):
        return next((key for key, other in self.known.items() if other == page), None)

    def allocate(self, count, keys=()):
        wanted = list(itertools.takewhile(self.host.__contains__, keys))[:count]
        blank = [self.blank.pop() for _ in range(min(count, len(self.blank)))]
        evicted = self.order[: count - len(blank)]
        self.order = self.order[len(evicted) :]
        gone = {page: self.key_of(page) for page in evicted}
        self.known = {key: page for key, page in self.known.items() if page not in evicted}
        self.store(gone, wanted)
        for page, key in zip(blank + evicted, wanted, strict=False):
            self.moves.append(("load", key, page))
            self.known.setdefault(key, page)
        self.due |= set(wanted)
        self.use(reversed(wanted))
        return blank + evicted

    def store(self, gone, wanted):
        new = {page: key for page, key in gone.items() if key not in self.host}
        stays = {*wanted, *self.due, *gone.values()}
        losable = [key for key in self.host if key not in stays]
        room = self.host_slots - len(self.host)
        kept = list(new.items())[max(0, len(new) - room - len(losable)) :]
        for key in losable[: max(0, len(kept) - room)]:
            self.host.remove(key)
        self.moves += [("store", key, page) for page, key in kept]
        self.due |= {key for _, key in kept}
        lost = set(new.items()) - set(kept)
        self.use(key for page, key in gone.items() if (page, key) not in lost)

    def use(self, keys):
        for key in list(keys):
            self.host = [other for other in self.host if other != key] + [key]

    def hold(self, pages):
        self.order = [page for page in self.order if page not in pages]
        self.held.append(list(pages))

    def release(self, i):
        pages = self.held.pop(i)
        for page in reversed(pages):
            if not self.holders(page):
                if self.key_of(page) is None:
                    self.blank.append(page)
                else:
                    self.order.append(page)

    def publish(self, pages, keys):
        for page, key in zip(pages, keys, strict=True):
            if key not in self.known and self.key_of(page) is None:
                self.known[key] = page

    def find(self, keys):
        found = []
        for key in keys:
            if key not in self.known:
                break
            found.append(self.known[key])
        return found


def hashable(keys):
    return [tuple(key) for key in keys.tolist()]


def arrays(pool):
    return [x for x in (*pool, *(pool.host or ())) if isinstance(x, np.ndarray)]


def taken(pool):
    """The pool, and as the model has them the copies that were due: ("store" or "load", the slot's
    key, page)."""
    host, stores, loads = tier.take(pool.host)
    names = dict(host.names.items())
    moves = [("store", names[slot], page) for page, slot in stores.tolist()]
    moves += [("load", names[slot], page) for slot, page in loads.tolist()]
    return pool._replace(host=host), moves


def number(key):
    (found,) = numbers(np.array([key], np.uint64))
    return found


@given(data=st.data(), num_pages=st.integers(2, 14), host_slots=st.integers(0, 8))
def test_pool_against_its_model(data, num_pages, host_slots):
    """Sequences over a tiny alphabet begin alike often; they come, share, publish, fork and go."""
    pool, model = create(num_pages, host_slots), Model(num_pages, host_slots)
    for _ in range(data.draw(st.integers(0, 25))):
        before, contents = pool, [x.copy() for x in arrays(pool)]
        action = data.draw(st.sampled_from(["begin", "begin", "grow", "fork", "end", "take"]))
        if action == "begin":
            text = data.draw(st.lists(st.integers(0, 1), max_size=20))
            keys = page_keys(np.array(text), PAGE)
            found = find(pool, keys)
            assert found.tolist() == model.find(hashable(keys))
            wanted = pages_for(len(text), PAGE) - len(found)
            shared = share(pool, found)
            if wanted > shared.available:
                continue
            pool, own = allocate(shared, wanted, keys[len(found) :])
            model.hold(found.tolist())
            own_of_model = model.allocate(wanted, hashable(keys)[len(found) :])
            assert own.tolist() == own_of_model
            model.held[-1] += own_of_model
            pages = np.concatenate([found, own])
            assert pages.dtype == np.int32
            pool = publish(pool, pages[: len(keys)], keys)
            model.publish(pages.tolist()[: len(keys)], hashable(keys))
        elif action == "take":
            if pool.host is not None:
                pool, moves = taken(pool)
                stores_first = sorted(model.moves, key=lambda move: move[0] == "load")
                assert moves == [(kind, number(key), page) for kind, key, page in stores_first]
                model.moves, model.due = [], set()
        elif not model.held:
            continue
        elif action == "grow":
            if not pool.available:
                continue
            i = data.draw(st.integers(0, len(model.held) - 1))
            pool, own = allocate(pool, 1)
            more = model.allocate(1)
            assert own.tolist() == more
            model.held[i] += more
        elif action == "fork":
            pages = model.held[data.draw(st.integers(0, len(model.held) - 1))]
            full = data.draw(st.integers(0, len(pages)))
            if len(pages) - full > pool.available:
                continue
            pool, new, copied = fork(pool, ids(*pages), full)
            assert new[:full].tolist() == pages[:full]
            assert copied.tolist() == pages[full:]
            model.hold(pages[:full])
            model.held[-1] += model.allocate(len(pages) - full)
            assert new.tolist() == model.held[-1]
        else:
            i = data.draw(st.integers(0, len(model.held) - 1))
            pool = release(pool, ids(*model.held[i]))
            model.release(i)
        check(pool, [ids(*pages) for pages in model.held])
        assert pool.available == len(model.blank) + len(model.order)
        if pool.host is not None:
            assert {number(key) for key in model.host} == dict(pool.host.known.items()).keys()
        assert all(np.array_equal(a, b) for a, b in zip(arrays(before), contents, strict=True))
        assert not any(x.flags.writeable for x in arrays(pool))


def test_what_is_let_go_of_first_goes_first_and_ends_before_beginnings():
    keys = page_keys(np.arange(12), PAGE)
    pool, pages = allocate(create(6), 3)
    pool = release(publish(pool, pages, keys), pages)
    pool, other = allocate(pool, 2)  # blank ones
    assert not set(other) & set(pages)
    assert find(pool, keys).tolist() == pages.tolist()
    pool, more = allocate(pool, 1)
    assert more.tolist() == [pages[2]]
    assert find(pool, keys).tolist() == pages[:2].tolist()


def test_what_leaves_the_device_is_found_on_the_host():
    keys = page_keys(np.arange(12), PAGE)
    pool, pages = allocate(create(4, host_slots=2), 3)
    pool = release(publish(pool, pages, keys), pages)
    pool, other = allocate(pool, 3)  # all that there are; of three pages the end is lost
    pool, moves = taken(pool)
    first, second, _ = map(number, hashable(keys))
    assert moves == [("store", second, pages[1]), ("store", first, pages[0])]
    pool, again = allocate(release(pool, other), 3, keys)
    assert find(pool, keys).tolist() == again[:2].tolist()
    pool, moves = taken(pool)
    assert moves == [("load", first, again[0]), ("load", second, again[1])]
    pool, other = allocate(release(pool, again), 3)
    assert taken(pool)[1] == []  # both are there still


def test_what_is_about_to_be_read_is_not_overwritten():
    """A host of one slot: who comes for it takes the page of another, which finds no room then."""
    keys, others = page_keys(np.arange(4), PAGE), page_keys(np.arange(1, 5), PAGE)
    pool, pages = allocate(create(2, host_slots=1), 1)
    pool = release(publish(pool, pages, keys), pages)
    pool, pages = allocate(pool, 1)
    pool, _ = taken(release(publish(pool, pages, others), pages))
    pool, pages = allocate(pool, 1, keys)
    assert taken(pool)[1] == [("load", number(hashable(keys)[0]), pages[0])]


def test_a_remembered_page_is_held_again():
    keys = page_keys(np.arange(4), PAGE)
    pool, pages = allocate(create(3), 1)
    pool = release(publish(pool, pages, keys), pages)
    pool = share(pool, find(pool, keys))
    assert pool.available == 1
    pool, other = allocate(pool, 1)
    assert other.tolist() != pages.tolist()
    assert find(pool, keys).tolist() == pages.tolist()


def test_keys_name_all_tokens_before_them_and_the_salt():
    text = np.arange(3 * PAGE + 1)
    keys = hashable(page_keys(text, PAGE))
    assert len(keys) == 3
    changed = text.copy()
    changed[0] += 1
    assert not set(keys) & set(hashable(page_keys(changed, PAGE)))
    assert not set(keys) & set(hashable(page_keys(text, PAGE, salt=b"adapter")))
    assert hashable(page_keys(text[: 2 * PAGE], PAGE)) == keys[:2]
    assert hashable(page_keys(text.astype(np.int64), PAGE)) == keys
    assert len(page_keys(text[: PAGE - 1], PAGE)) == 0


def test_a_key_that_agrees_by_half_is_not_found():
    pool, pages = allocate(create(4), 1)
    keys = page_keys(np.arange(4), PAGE)
    pool = publish(pool, pages, keys)
    assert not len(find(pool, keys ^ np.array([0, 1], np.uint64)))


def test_create_needs_two_pages():
    with pytest.raises(ValueError, match=r"num_pages=1: expected at least 2"):
        create(1)


def test_allocate_more_than_is_free():
    pool, _ = allocate(create(4), 2)
    with pytest.raises(ValueError, match="2 pages wanted, 1 free"):
        allocate(pool, 2)


@pytest.mark.parametrize("pages", [[0], [4], [-1], [1, 4]])
@pytest.mark.parametrize("function", [share, release])
def test_pages_out_of_range(function, pages):
    pool, _ = allocate(create(4), 3)
    with pytest.raises(ValueError, match="expected 1 to 3"):
        function(pool, ids(*pages))


@pytest.mark.parametrize("function", [share, release])
def test_a_page_named_twice(function):
    pool, _ = allocate(create(4), 2)
    with pytest.raises(ValueError, match="named twice"):
        function(pool, ids(1, 1))


@pytest.mark.parametrize("pages", [[3], [1, 3]])
def test_release_twice(pages):
    pool, _ = allocate(create(4), 2)
    with pytest.raises(ValueError, match="free already"):
        release(pool, ids(*pages))


def test_share_what_nobody_knows():
    with pytest.raises(ValueError, match="neither held nor remembered"):
        share(create(4), ids(2))


def test_publish_what_nobody_holds_or_what_is_known_otherwise():
    keys = page_keys(np.arange(4), PAGE)
    with pytest.raises(ValueError, match="held by nobody"):
        publish(create(4), ids(2), keys)
    pool, pages = allocate(create(4), 1)
    pool = publish(pool, pages, keys)
    assert publish(pool, pages, keys) is pool
    with pytest.raises(ValueError, match="known by another key"):
        publish(pool, pages, page_keys(np.arange(1, 5), PAGE))


def test_release_nothing():
    pool = create(3)
    assert release(pool, ids()).available == pool.available == 2


def test_check_sees_a_leak():
    pool, pages = allocate(create(4), 2)
    check(pool, [pages])
    with pytest.raises(AssertionError, match="hold"):
        check(pool, [pages[:1]])


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (8, 1), (9, 2), (64, 8)])
def test_pages_for(tokens, pages):
    assert pages_for(tokens, 8) == pages
