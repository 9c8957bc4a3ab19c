"""Data and metric of detection.py: drawn images with their boxes, and average precision."""

import torch


def drawings(number, seed):  # (image, boxes of x, y, width, height): bright rectangles in noise
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(number):
        rows, columns = (8 * torch.randint(4, 8, (2,), generator=generator)).tolist()
        image, boxes = torch.rand(1, rows, columns, generator=generator), []
        for left in range(0, columns - 15, 16):
            x, y = (
                left + torch.randint(4, (1,), generator=generator),
                torch.randint(rows - 12, (1,), generator=generator),
            )
            width, height = torch.randint(5, 13, (2,), generator=generator)
            image[0, y : y + height, x : x + width] += 0.5
            boxes.append([x, y, width, height])
        found.append((image, torch.tensor(boxes, dtype=torch.float32)))
    return found


def average_precision(found, boxes):  # at an overlap (IoU) of 0.5
    rows = sorted(((*row, n) for n, image in enumerate(found) for row in image.tolist()), reverse=True)
    free, hits = [target.tolist() for target in boxes], []
    for _, x, y, w, h, n in rows:
        hits.append(0)
        for box in free[n]:
            inner = max(0, min(x + w, box[0] + box[2]) - max(x, box[0])) * max(
                0, min(y + h, box[1] + box[3]) - max(y, box[1])
            )
            if inner > (w * h + box[2] * box[3]) / 3:
                hits[-1] = 1
                free[n].remove(box)
                break
    hits = torch.tensor(hits, dtype=torch.float64)
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    best = precision.flip(0).cummax(0).values.flip(0) if len(hits) else precision
    return float((best * hits).sum() / sum(map(len, boxes)))
