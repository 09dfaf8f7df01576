/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loops of core/ring.py and core/slots.py over rings of up to 2^18 slots and all flow records, in C.
 *
 * Each function has a plain-Python twin in tests/reference.py that must give the same bytes; what a function
 * means is told in ring.py and slots.py. Buffers come as bytes-like objects of any alignment; one that does not
 * fit raises ValueError. The interpreter goes on while a loop runs.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_judge.h"
#include "_maglev.h"
#include "_words.h"

#define NS_PER_S 1000000000ULL

static PyObject *refused(const char *why)
{
	PyErr_SetString(PyExc_ValueError, why);
	return NULL;
}

static PyObject *build(PyObject *self, PyObject *args)
{
	Py_buffer keys = {0}, names = {0}, weights = {0};
	unsigned int bits;
	PyObject *out = NULL;
	struct ring ring = {0};
	bool is_done;

	if (!PyArg_ParseTuple(args, "y*y*y*I", &keys, &names, &weights, &bits))
		return NULL;
	if (bits < 1 || bits > RING_BITS_MAX || keys.len % 8 || names.len != keys.len || weights.len != keys.len / 2) {
		refused("keys, names, weights and bits do not fit together");
		goto out;
	}
	ring.entrants = malloc(keys.len / 8 * sizeof(*ring.entrants) + 1);
	if (!ring.entrants) {
		PyErr_NoMemory();
		goto out;
	}
	for (Py_ssize_t i = 0; i < keys.len / 8; i++)
		if (get32(weights.buf, i))
			ring.entrants[ring.count++] = (struct entrant){
				get64(keys.buf, i), get64(names.buf, i), get32(weights.buf, i), i + 1};
	if (ring.count > 1U << bits || ring.count > MEMBERS_MAX) {
		refused("more members than slots, or than ranks");
		goto out;
	}
	out = PyBytes_FromStringAndSize(NULL, 4L << bits);
	if (!out)
		goto out;
	ring.bits = bits;
	ring.table = (__u32 *)PyBytes_AS_STRING(out);
	Py_BEGIN_ALLOW_THREADS
	if (ring.count) {
		is_done = fill_ring(&ring);
	} else {
		memset(ring.table, 0, 4UL << bits);
		is_done = true;
	}
	Py_END_ALLOW_THREADS
	if (!is_done) {
		Py_CLEAR(out);
		PyErr_NoMemory();
	}
out:
	free(ring.entrants);
	PyBuffer_Release(&keys);
	PyBuffer_Release(&names);
	PyBuffer_Release(&weights);
	return out;
}

/* ---- slots ------------------------------------------------------------------------------------------ */

/* A set of small integers as a bitmap of `size` bits, NULL with an exception set. */
static __u64 *bitmap_of(PyObject *numbers, size_t size, const char *what)
{
	__u64 *bits = calloc(size / 64 + 1, sizeof(__u64));
	PyObject *items = NULL, *item;

	if (!bits) {
		PyErr_NoMemory();
		return NULL;
	}
	items = PyObject_GetIter(numbers);
	while (items && (item = PyIter_Next(items))) {
		size_t number = PyLong_AsSize_t(item);

		Py_DECREF(item);
		if (number == (size_t)-1 && PyErr_Occurred()) {
			if (PyErr_ExceptionMatches(PyExc_OverflowError))
				PyErr_Format(PyExc_ValueError, "%s is out of range", what);
			break;
		}
		if (number >= size) {
			PyErr_Format(PyExc_ValueError, "%s %zu is out of range", what, number);
			break;
		}
		set_bit(bits, number);
	}
	Py_XDECREF(items);
	if (PyErr_Occurred()) {
		free(bits);
		return NULL;
	}
	return bits;
}

static PyObject *renumber(PyObject *self, PyObject *args)
{
	Py_buffer table, numbers;
	PyObject *out = NULL;
	Py_ssize_t count, known;
	bool fits = true;

	if (!PyArg_ParseTuple(args, "y*y*", &table, &numbers))
		return NULL;
	count = table.len / 4;
	known = numbers.len / 4;
	if (table.len % 4 || numbers.len % 4) {
		refused("not made of 32-bit words");
	} else if ((out = PyBytes_FromStringAndSize(NULL, table.len))) {
		char *to = PyBytes_AS_STRING(out);

		Py_BEGIN_ALLOW_THREADS
		for (Py_ssize_t i = 0; i < count; i++) {
			__u32 index = get32(table.buf, i), number = 0;

			if (index > known)
				fits = false;
			else if (index)
				number = get32(numbers.buf, index - 1);
			put32(to, i, number);
		}
		Py_END_ALLOW_THREADS
		if (!fits) {
			Py_CLEAR(out);
			refused("the table names a member that is not there");
		}
	}
	PyBuffer_Release(&table);
	PyBuffer_Release(&numbers);
	return out;
}

static PyObject *heads(PyObject *self, PyObject *args)
{
	Py_buffer slots;
	PyObject *out = NULL;

	if (!PyArg_ParseTuple(args, "y*", &slots))
		return NULL;
	if (slots.len % 8) {
		refused("slots are not made of 64-bit words");
	} else if ((out = PyBytes_FromStringAndSize(NULL, slots.len / 2))) {
		char *to = PyBytes_AS_STRING(out);

		Py_BEGIN_ALLOW_THREADS
		for (Py_ssize_t i = 0; i < slots.len / 8; i++)
			put32(to, i, head_of(get64(slots.buf, i)));
		Py_END_ALLOW_THREADS
	}
	PyBuffer_Release(&slots);
	return out;
}

static PyObject *fresh(PyObject *self, PyObject *args)
{
	Py_buffer owners;
	PyObject *out = NULL;
	__u32 all = 0;

	if (!PyArg_ParseTuple(args, "y*", &owners))
		return NULL;
	if (owners.len % 4) {
		refused("owners are not made of 32-bit words");
	} else if ((out = PyBytes_FromStringAndSize(NULL, owners.len * 2))) {
		char *to = PyBytes_AS_STRING(out);

		Py_BEGIN_ALLOW_THREADS
		for (Py_ssize_t i = 0; i < owners.len / 4; i++) {
			__u32 owner = get32(owners.buf, i);

			all |= owner;
			put64(to, i, quiet(owner));
		}
		Py_END_ALLOW_THREADS
		if (all > REAL_MASK) {
			Py_CLEAR(out);
			refused("an owner is not the number of a real");
		}
	}
	PyBuffer_Release(&owners);
	return out;
}

static PyObject *succeed(PyObject *self, PyObject *args)
{
	Py_buffer slots, owners;
	PyObject *gone, *out = NULL;
	unsigned long long now_s;
	__u64 *dead = NULL;
	__u32 all = 0;

	if (!PyArg_ParseTuple(args, "y*y*OK", &slots, &owners, &gone, &now_s))
		return NULL;
	if (slots.len % 8 || slots.len != owners.len * 2) {
		refused("slots and owners do not fit together");
		goto out;
	}
	dead = bitmap_of(gone, REALS, "real");
	if (!dead)
		goto out;
	out = PyBytes_FromStringAndSize(NULL, slots.len);
	if (out) {
		char *to = PyBytes_AS_STRING(out);

		Py_BEGIN_ALLOW_THREADS
		for (Py_ssize_t i = 0; i < slots.len / 8; i++) {
			__u32 owner = get32(owners.buf, i);

			all |= owner;
			put64(to, i, successor(get64(slots.buf, i), owner, dead, now_s & CHANGED_MASK));
		}
		Py_END_ALLOW_THREADS
		if (all > REAL_MASK) {
			Py_CLEAR(out);
			refused("an owner is not the number of a real");
		}
	}
out:
	free(dead);
	PyBuffer_Release(&slots);
	PyBuffer_Release(&owners);
	return out;
}

/* Each of the `width` bytes wide words 2^times times. */
static PyObject *repeat(PyObject *self, PyObject *args)
{
	Py_buffer words;
	unsigned int width, times;
	PyObject *out = NULL;

	if (!PyArg_ParseTuple(args, "y*II", &words, &width, &times))
		return NULL;
	if ((width != 4 && width != 8) || words.len % width || times > RING_BITS_MAX ||
	    words.len > (Py_ssize_t)width << RING_BITS_MAX) {
		refused("not a ring's words, or too many");
	} else if ((out = PyBytes_FromStringAndSize(NULL, words.len << times))) {
		char *to = PyBytes_AS_STRING(out);

		Py_BEGIN_ALLOW_THREADS
		for (Py_ssize_t i = 0; i < words.len / width; i++)
			for (__u32 copy = 0; copy < 1U << times; copy++, to += width)
				memcpy(to, (char *)words.buf + i * width, width);
		Py_END_ALLOW_THREADS
	}
	PyBuffer_Release(&words);
	return out;
}

/* One slot for each 2^times neighbours, None when some of those differ. */
static PyObject *thin(PyObject *self, PyObject *args)
{
	Py_buffer slots;
	unsigned int times;
	PyObject *out = NULL;
	bool agree = true;

	if (!PyArg_ParseTuple(args, "y*I", &slots, &times))
		return NULL;
	if (times > RING_BITS_MAX || slots.len % (8L << times)) {
		refused("slots cannot be thinned by so much");
	} else if ((out = PyBytes_FromStringAndSize(NULL, slots.len >> times))) {
		char *to = PyBytes_AS_STRING(out);

		Py_BEGIN_ALLOW_THREADS
		for (Py_ssize_t i = 0; agree && i < slots.len / 8; i++) {
			__u64 slot = get64(slots.buf, i), first = get64(slots.buf, i >> times << times);

			agree = slot == first;
			put64(to, i >> times, first);
		}
		Py_END_ALLOW_THREADS
		if (!agree) {
			Py_DECREF(out);
			out = Py_NewRef(Py_None);
		}
	}
	PyBuffer_Release(&slots);
	return out;
}

static PyObject *list_of(const __u32 *numbers, size_t count)
{
	PyObject *list = PyList_New((Py_ssize_t)count);

	for (size_t i = 0; list && i < count; i++) {
		PyObject *item = PyLong_FromUnsignedLong(numbers[i]);

		if (item)
			PyList_SET_ITEM(list, (Py_ssize_t)i, item);
		else
			Py_CLEAR(list);
	}
	return list;
}

static PyObject *settled(PyObject *self, PyObject *args)
{
	Py_buffer slots;
	PyObject *exceptions, *out = NULL;
	unsigned long long settle_s, now_s;
	__u64 *excepted = NULL;
	__u32 *found = NULL;
	size_t count = 0;

	if (!PyArg_ParseTuple(args, "y*OKK", &slots, &exceptions, &settle_s, &now_s))
		return NULL;
	if (slots.len % 8) {
		refused("slots are not made of 64-bit words");
		goto out;
	}
	excepted = bitmap_of(exceptions, slots.len / 8, "slot");
	if (!excepted)
		goto out;
	found = malloc(slots.len / 2 + 1);
	if (!found) {
		PyErr_NoMemory();
		goto out;
	}
	Py_BEGIN_ALLOW_THREADS
	for (size_t i = 0; i < (size_t)slots.len / 8; i++) {
		__u64 slot = get64(slots.buf, i);

		if (slot & TRACKED && age_of(slot, now_s) > settle_s && !get_bit(excepted, i))
			found[count++] = i;
	}
	Py_END_ALLOW_THREADS
	out = list_of(found, count);
out:
	free(excepted);
	free(found);
	PyBuffer_Release(&slots);
	return out;
}

static PyObject *settle(PyObject *self, PyObject *args)
{
	Py_buffer slots;
	PyObject *numbers, *out = NULL;
	__u64 *chosen = NULL;

	if (!PyArg_ParseTuple(args, "y*O", &slots, &numbers))
		return NULL;
	if (slots.len % 8) {
		refused("slots are not made of 64-bit words");
		goto out;
	}
	chosen = bitmap_of(numbers, slots.len / 8, "slot");
	if (!chosen)
		goto out;
	out = PyBytes_FromStringAndSize(NULL, slots.len);
	if (out) {
		char *to = PyBytes_AS_STRING(out);

		Py_BEGIN_ALLOW_THREADS
		for (Py_ssize_t i = 0; i < slots.len / 8; i++) {
			__u64 slot = get64(slots.buf, i);

			put64(to, i, get_bit(chosen, i) ? quiet(owner_of(slot)) : slot);
		}
		Py_END_ALLOW_THREADS
	}
out:
	free(chosen);
	PyBuffer_Release(&slots);
	return out;
}

/* Both are given up. False with an exception set. */
static bool put(PyObject *dict, PyObject *key, PyObject *value)
{
	bool is_done = key && value && !PyDict_SetItem(dict, key, value);

	Py_XDECREF(key);
	Py_XDECREF(value);
	return is_done;
}

/* {number: count} of the counts that are not 0. */
static PyObject *dict_of(const __u32 *counts, size_t size)
{
	PyObject *dict = PyDict_New();

	for (size_t number = 0; dict && number < size; number++)
		if (counts[number] && !put(dict, PyLong_FromSize_t(number), PyLong_FromUnsignedLong(counts[number])))
			Py_CLEAR(dict);
	return dict;
}

static PyObject *census(PyObject *self, PyObject *args)
{
	Py_buffer slots;
	PyObject *by_owner = NULL, *by_elder = NULL, *out = NULL;
	__u32 *owners = NULL, *elders = NULL, most = 0;

	if (!PyArg_ParseTuple(args, "y*", &slots))
		return NULL;
	if (slots.len % 8) {
		refused("slots are not made of 64-bit words");
		goto out;
	}
	Py_BEGIN_ALLOW_THREADS
	for (Py_ssize_t i = 0; i < slots.len / 8; i++) {
		__u64 slot = get64(slots.buf, i);

		most |= owner_of(slot) | elder_of(slot);
	}
	owners = calloc(most + 1, sizeof(__u32));
	elders = calloc(most + 1, sizeof(__u32));
	for (Py_ssize_t i = 0; owners && elders && i < slots.len / 8; i++) {
		__u64 slot = get64(slots.buf, i);

		owners[owner_of(slot)]++;
		if (slot & TRACKED)
			elders[elder_of(slot)]++;
	}
	Py_END_ALLOW_THREADS
	if (!owners || !elders) {
		PyErr_NoMemory();
		goto out;
	}
	by_owner = dict_of(owners, most + 1);
	by_elder = dict_of(elders, most + 1);
	if (by_owner && by_elder)
		out = PyTuple_Pack(2, by_owner, by_elder);
out:
	free(owners);
	free(elders);
	Py_XDECREF(by_owner);
	Py_XDECREF(by_elder);
	PyBuffer_Release(&slots);
	return out;
}

/* ---- judging flow records --------------------------------------------------------------------------- */

/* The greatest key of a dict of numbers below `limit`, plus 1; -1 with an exception set. */
static Py_ssize_t size_for(PyObject *dict, Py_ssize_t limit)
{
	PyObject *key, *value;
	Py_ssize_t at = 0, size = 0;

	while (PyDict_Next(dict, &at, &key, &value)) {
		Py_ssize_t number = PyLong_AsSsize_t(key);

		if (number == -1 && PyErr_Occurred())
			return -1;
		if (number < 0 || number >= limit) {
			PyErr_Format(PyExc_ValueError, "number %zd is out of range", number);
			return -1;
		}
		if (number >= size)
			size = number + 1;
	}
	return size;
}

static bool call_vips(struct court *court, PyObject *vips)
{
	PyObject *key, *value;
	Py_ssize_t at = 0, size = size_for(vips, REALS);

	if (size < 0)
		return false;
	court->vip_count = size;
	court->vips = calloc(size + 1, sizeof(*court->vips));
	if (!court->vips) {
		PyErr_NoMemory();
		return false;
	}
	while (PyDict_Next(vips, &at, &key, &value)) {
		struct judged_vip *vip = &court->vips[PyLong_AsSsize_t(key)];
		unsigned long long settle_s;
		PyObject *slots;

		if (!PyTuple_Check(value)) {
			refused("a VIP is (bits, slots, settle_s)");
			return false;
		}
		if (!PyArg_ParseTuple(value, "ISK", &vip->bits, &slots, &settle_s))
			return false;
		if (vip->bits < 1 || vip->bits > RING_BITS_MAX || PyBytes_GET_SIZE(slots) != 8L << vip->bits) {
			refused("slots and bits of a VIP do not fit together");
			return false;
		}
		vip->exceptions = calloc((1U << vip->bits) / 64 + 1, sizeof(__u64));
		if (!vip->exceptions) {
			PyErr_NoMemory();
			return false;
		}
		vip->settle_ns = settle_s < UINT64_MAX / NS_PER_S ? settle_s * NS_PER_S : UINT64_MAX;
		vip->slots = PyBytes_AS_STRING(slots);
	}
	return true;
}

static bool call_reals(struct court *court, PyObject *reals)
{
	PyObject *key, *value;
	Py_ssize_t at = 0, size = size_for(reals, REALS);

	if (size < 0)
		return false;
	court->real_count = size;
	court->reals = calloc(size + 1, sizeof(*court->reals));
	if (!court->reals) {
		PyErr_NoMemory();
		return false;
	}
	while (PyDict_Next(reals, &at, &key, &value)) {
		struct judged_real *real = &court->reals[PyLong_AsSsize_t(key)];
		unsigned int generation;
		int serves;

		if (!PyTuple_Check(value)) {
			refused("a real is (vip, generation, serving)");
			return false;
		}
		if (!PyArg_ParseTuple(value, "IIp", &real->vip, &generation, &serves))
			return false;
		real->generation = generation;
		real->serves = serves;
	}
	return true;
}

static PyObject *list_of_bits(const __u64 *bits, size_t words)
{
	Py_ssize_t count = 0, at = 0;
	PyObject *list;

	for (size_t word = 0; word < words; word++)
		count += __builtin_popcountll(bits[word]);
	list = PyList_New(count);
	for (size_t word = 0; list && word < words; word++)
		for (__u64 left = bits[word]; list && left; left &= left - 1) {
			PyObject *item = PyLong_FromSize_t(word * 64 + (size_t)__builtin_ctzll(left));

			if (item)
				PyList_SET_ITEM(list, at++, item);
			else
				Py_CLEAR(list);
		}
	return list;
}

static PyObject *exceptions_of(const struct court *court)
{
	PyObject *out = PyDict_New();

	for (size_t number = 0; out && number < court->vip_count; number++) {
		const struct judged_vip *vip = &court->vips[number];

		if (vip->has_exceptions && !put(out, PyLong_FromSize_t(number),
						list_of_bits(vip->exceptions, (1U << vip->bits) / 64 + 1)))
			Py_CLEAR(out);
	}
	return out;
}

static PyObject *live_of(const struct court *court)
{
	PyObject *out = PyDict_New();

	for (size_t number = 0; out && number < court->real_count; number++) {
		__u32 live = court->reals[number].live;

		if (live && !put(out, PyLong_FromSize_t(number), PyLong_FromUnsignedLong(live)))
			Py_CLEAR(out);
	}
	return out;
}

static PyObject *judge(PyObject *self, PyObject *args)
{
	Py_buffer keys, values;
	PyObject *vips, *reals, *forget_list, *live, *exceptions, *out = NULL;
	Py_ssize_t count;
	unsigned long long now_ns, ending_s, udp_idle_s;
	struct court court = {0};
	__u32 *forget = NULL;
	size_t forgotten;

	if (!PyArg_ParseTuple(args, "y*y*nO!O!KKK", &keys, &values, &count, &PyDict_Type, &vips, &PyDict_Type, &reals,
			      &now_ns, &ending_s, &udp_idle_s))
		return NULL;
	if (count < 0 || count > UINT32_MAX || keys.len != count * (Py_ssize_t)sizeof(struct flow_key) ||
	    values.len != count * (Py_ssize_t)sizeof(struct flow)) {
		refused("keys, values and count do not fit together");
		goto out;
	}
	if (!call_vips(&court, vips) || !call_reals(&court, reals))
		goto out;
	court.now_ns = now_ns;
	court.ending_ns = ending_s < UINT64_MAX / NS_PER_S ? ending_s * NS_PER_S : UINT64_MAX;
	court.udp_idle_ns = udp_idle_s < UINT64_MAX / NS_PER_S ? udp_idle_s * NS_PER_S : UINT64_MAX;
	forget = malloc((count + 1) * sizeof(*forget));
	if (!forget) {
		PyErr_NoMemory();
		goto out;
	}
	Py_BEGIN_ALLOW_THREADS
	forgotten = judge_all(&court, keys.buf, values.buf, count, forget);
	Py_END_ALLOW_THREADS
	forget_list = list_of(forget, forgotten);
	live = live_of(&court);
	exceptions = exceptions_of(&court);
	if (forget_list && live && exceptions)
		out = PyTuple_Pack(3, forget_list, live, exceptions);
	Py_XDECREF(forget_list);
	Py_XDECREF(live);
	Py_XDECREF(exceptions);
out:
	for (size_t i = 0; court.vips && i < court.vip_count; i++)
		free(court.vips[i].exceptions);
	free(court.vips);
	free(court.reals);
	free(forget);
	PyBuffer_Release(&keys);
	PyBuffer_Release(&values);
	return out;
}

static PyMethodDef methods[] = {
	{"build", build, METH_VARARGS, NULL},
	{"renumber", renumber, METH_VARARGS, NULL},
	{"heads", heads, METH_VARARGS, NULL},
	{"fresh", fresh, METH_VARARGS, NULL},
	{"succeed", succeed, METH_VARARGS, NULL},
	{"repeat", repeat, METH_VARARGS, NULL},
	{"thin", thin, METH_VARARGS, NULL},
	{"settled", settled, METH_VARARGS, NULL},
	{"settle", settle, METH_VARARGS, NULL},
	{"census", census, METH_VARARGS, NULL},
	{"judge", judge, METH_VARARGS, NULL},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "lbagent.core._ring",
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit__ring(void)
{
	return PyModule_Create(&module);
}
