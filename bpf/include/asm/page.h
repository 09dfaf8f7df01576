/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once
#define PAGE_SHIFT 12
#define PAGE_SIZE (1 << PAGE_SHIFT)
