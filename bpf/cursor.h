/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Where parsing is in a frame. Nothing is read that was not taken first. */
#pragma once

struct cursor {
	void *at;
	void *end;
};

/* Take `size` bytes, a constant: where they begin, or NULL when the frame ends before they do. */
static __always_inline void *take(struct cursor *cursor, __u64 size)
{
	void *taken = cursor->at;

	if (taken + size > cursor->end)
		return NULL;
	cursor->at = taken + size;
	return taken;
}
