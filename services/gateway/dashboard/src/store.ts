/** A value that components follow: the whole state management of the dashboard. */
import { useEffect, useState } from "preact/hooks";

export class Store<T> {
  private readonly followers = new Set<() => void>();

  constructor(public value: T) {}

  set(value: T): void {
    this.value = value;
    for (const follower of [...this.followers]) follower();
  }

  update(change: Partial<T>): void {
    this.set({ ...this.value, ...change });
  }

  follow(follower: () => void): () => void {
    this.followers.add(follower);
    return () => this.followers.delete(follower);
  }
}

/** The part of a store that `select` takes; the component is drawn again when it is another value. */
export function useStore<T, S>(store: Store<T>, select: (value: T) => S): S {
  const [selected, setSelected] = useState(() => select(store.value));
  useEffect(() => {
    const follow = () => setSelected(() => select(store.value));
    follow();
    return store.follow(follow);
  }, [store]);
  return selected;
}
