//! Values under small numbers that are used again, so that the numbers never run out.

/// Values, each in a slot.
#[derive(Debug)]
pub(super) struct Slab<T> {
    items: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            items: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slab<T> {
    pub(super) fn len(&self) -> usize {
        self.items.len() - self.free.len()
    }

    pub(super) fn get(&self, slot: u32) -> Option<&T> {
        self.items.get(slot as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, slot: u32) -> Option<&mut T> {
        self.items.get_mut(slot as usize)?.as_mut()
    }

    /// The slot that the next insert takes.
    pub(super) fn vacant(&self) -> u32 {
        // Every table bounds its items well below what a `u32` counts.
        let next = self.items.len() as u32;
        self.free.last().copied().unwrap_or(next)
    }

    pub(super) fn insert(&mut self, item: T) -> u32 {
        let slot = self.vacant();
        match self.free.pop() {
            Some(_) => self.items[slot as usize] = Some(item),
            None => self.items.push(Some(item)),
        }
        slot
    }

    pub(super) fn remove(&mut self, slot: u32) -> Option<T> {
        let item = self.items.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        if self.len() == 0 {
            // Gives back what a flood has taken.
            *self = Self::default();
        }
        Some(item)
    }

    /// All slots that were ever taken at once.
    #[cfg(test)]
    pub(super) fn slots(&self) -> usize {
        self.items.len()
    }

    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let items = (0..).zip(&self.items);
        items.filter_map(|(slot, item)| Some((slot, item.as_ref()?)))
    }
}
